"""Biases beside two factors: one on B, and an adapter's own copy of the layer's.

``y = host(x) + Σ w · (s · (B A x + β) + (b - b₀))``, for adapters with factors w, b₀ being the
base's bias, β the one on B and b the adapter's copy of b₀. What is added for the biases is one
vector for each layer and call, whatever way the rest is computed in. A layer whose adapters have
none does nothing here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_lora.compat.deepspeed import shape_of
from hf_lora.compat.dtensor import full_tensor
from hf_lora.functional.low_rank import Product
from hf_lora.layers.choice import Weights
from hf_lora.layers.factors import Factored
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.meta import set_full
from hf_lora.layers.names import LORA_B, LORA_BIAS, copy_kind, parameter_name
from hf_lora.layers.replaced import Replaced, Tensors, in_place_of
from hf_lora.layers.roles import BIAS_OF_B, IN_FULL_VECTORS, OWN_BIAS, Role, Shapes
from hf_lora.layers.tensor_parallel import split_fault, split_of, to_local
from hf_lora.layers.trained import stored

_KEYS = {LORA_BIAS: "lora_B.bias", OWN_BIAS: "base_layer.bias"}
"""What they are called in a file, below the layer's path."""

_GROUPS = {LORA_BIAS: BIAS_OF_B, OWN_BIAS: IN_FULL_VECTORS}


def own_bias_fault(module: nn.Module) -> str | None:
    """Return why a module's own bias, which is there, cannot be trained, or None."""
    bias = parameter_of(module, OWN_BIAS)
    assert bias is not None
    if split_of(module) is not None or split_fault(module):
        return "tensor parallelism has split it, and its bias cannot be trained there"
    if not bias.is_floating_point() or bias.dtype.itemsize < 2:
        return f"its bias is of type {str(bias.dtype).removeprefix('torch.')}"
    return None


def bias_kinds(config: LayerConfig) -> list[str]:
    """Return the kinds of names that an adapter of these numbers has biases under."""
    kinds = {LORA_BIAS: config.lora_bias, copy_kind(OWN_BIAS): config.bias}
    return [kind for kind, has in kinds.items() if has]


def bias_products(config: LayerConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Product]:
    """Return what the bias on B adds to the host's own as a product, ``s`` times β, or nothing."""
    if LORA_BIAS not in tensors:
        return {}
    beta_O = tensors[LORA_BIAS]
    wide = torch.promote_types(beta_O.dtype, torch.float32)
    s = torch.full((1, 1, 1), config.scaling, dtype=wide)
    return {OWN_BIAS: Product(s, beta_O.to(wide)[None, None])}


def on_b_fault(shapes: Shapes) -> str | None:
    """Return why a bias among the tensors of a layer is none for its B, or None."""
    wanted = shapes[LORA_B][:1]
    if shapes.get(LORA_BIAS, wanted) != wanted:
        return f"has a bias on B of shape {shapes[LORA_BIAS]}, which for this B would be {wanted}"
    return None


class Biased(Factored):
    """Mixin of kinds whose layers end by adding a bias, whether they have one or not."""

    @classmethod
    def lora_bias_shapes(cls, host: nn.Module, config: LayerConfig) -> dict[str, tuple[int, ...]]:
        """Return role to shape of the biases that an adapter of these numbers has on a module."""
        found = {}
        if config.lora_bias:
            factors = cls.lora_shapes(host, config)
            found[LORA_BIAS] = (factors[cls.lora_layout.roles[1]][0],)
        if config.bias:
            own = parameter_of(host, OWN_BIAS)
            assert own is not None
            found[OWN_BIAS] = shape_of(own)
        return found

    @classmethod
    def lora_bias_fault(cls, host: nn.Module, config: LayerConfig) -> str | None:
        """Return why a module cannot have the biases that are asked for, or None."""
        if config.lora_bias and split_of(host) is not None:
            return "tensor parallelism has split it, and a bias on B cannot follow that yet"
        return own_bias_fault(host) if config.bias else None

    @classmethod
    def lora_bias_fit_fault(cls, host: nn.Module, shapes: Shapes) -> str | None:
        """Return how biases in a file differ from what the module has room for, or None."""
        own = parameter_of(host, OWN_BIAS)
        if OWN_BIAS in shapes and (own is None or shape_of(own) != shapes[OWN_BIAS]):
            here = "none" if own is None else f"one of shape {shape_of(own)}"
            return f"the adapter has a bias of shape {shapes[OWN_BIAS]}, the layer has {here}"
        return None

    def lora_bias_held(self, adapter: str) -> dict[str, str]:
        """Return role to name on this module of an adapter's biases."""
        config = self.lora_slots[adapter]
        held = {LORA_BIAS: parameter_name(LORA_BIAS, adapter)} if config.lora_bias else {}
        own = {OWN_BIAS: parameter_name(copy_kind(OWN_BIAS), adapter)} if config.bias else {}
        return held | own

    def lora_add(
        self,
        adapter: str,
        config: LayerConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        init: str | None,
    ) -> None:
        """Give the layer the factors and biases of an adapter."""
        super().lora_add(adapter, config, dtype=dtype, device=device, init=init)
        starts = self._starts(self.lora_bias_shapes(self, config))
        for (role, start), held in zip(starts, self.lora_bias_held(adapter).values(), strict=True):
            bias = nn.Parameter(torch.empty(start.shape, dtype=dtype, device=device))
            if not bias.is_meta:
                bias.data.copy_(start.to(bias.device))
            self.lora_hold(held, bias)
            self.lora_routing.biased.setdefault(adapter, set()).add(role)

    def _starts(self, shapes: Shapes) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what biases are before they train: none on B, and the layer's own."""
        for role, shape in shapes.items():
            own = stored(self, OWN_BIAS) if role == OWN_BIAS else None
            if own is None or own.is_meta:
                yield role, torch.zeros(shape)
            else:  # what DeepSpeed has of a part is noted on this very Parameter
                yield role, full_tensor(own).detach()

    def lora_draw(self, names: set[str]) -> None:
        """Draw factors anew, and let biases be what they were at the start."""
        super().lora_draw(names)
        for adapter, config in self.lora_slots.items():
            held = self.lora_bias_held(adapter)
            for role, start in self._starts(self.lora_bias_shapes(self, config)):
                if held[role] in names:
                    set_full(stored(self, held[role]), start)

    def lora_remove(self, adapter: str) -> None:
        """Take the factors and biases of an adapter away."""
        names = self.lora_bias_held(adapter).values()
        super().lora_remove(adapter)
        for held in names:
            delattr(self, held)

    def lora_roles(self, adapter: str) -> tuple[Role, ...]:
        """Return A and B, then the biases."""
        shapes = self.lora_bias_shapes(self, self.lora_slots[adapter])
        return (
            *super().lora_roles(adapter),
            *(
                Role(role, held, shapes[role], _KEYS[role], _GROUPS[role])
                for role, held in self.lora_bias_held(adapter).items()
            ),
        )

    def lora_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return role to what this process has of the factors and biases."""
        held = self.lora_bias_held(adapter)
        biases = {role: stored(self, name) for role, name in held.items()}
        return super().lora_tensors(adapter) | biases

    def lora_added(self) -> set[str]:
        """Return the names of the factors and biases that this layer has."""
        biases = (held for name in self.lora_slots for held in self.lora_bias_held(name).values())
        return super().lora_added() | set(biases)

    def lora_is_at_start(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Say whether a factor is zero, and the biases are as they were."""
        config = self.lora_slots[adapter]
        biases = self._starts(self.lora_bias_shapes(self, config))
        return super().lora_is_at_start(adapter, tensors) and all(
            torch.equal(tensors[role], start.to(tensors[role])) for role, start in biases
        )

    def lora_merge_fault(self) -> str | None:
        """Return why updates cannot be put into the layer's own tensors, or None."""
        return self.lora_bias_merge_fault() or super().lora_merge_fault()

    def lora_bias_merge_fault(self) -> str | None:
        """Return why biases on B cannot be put into the layer's own, or None."""
        if parameter_of(self, OWN_BIAS) is None:
            for name, config in self.lora_slots.items():
                if config.lora_bias:
                    return f"B of {name!r} has a bias, and the layer has none to put it into"
        return None

    def lora_merged(self, adapters: Weights, replaced: Replaced | None) -> Tensors:
        """Return the weight with the sum of the adapters' updates, and the bias with theirs."""
        return super().lora_merged(adapters, replaced) | self.lora_merged_bias(adapters, replaced)

    def lora_merged_beside(self, adapters: Weights, replaced: Replaced | None) -> Tensors:
        """Return the merged bias, if adapters have some."""
        return self.lora_merged_bias(adapters, replaced)

    @torch.no_grad()
    def lora_merged_bias(self, adapters: Weights, replaced: Replaced | None) -> Tensors:
        """Return the bias that the layer would have with adapters in it, if they have any."""
        before = None if replaced is None else replaced.read(OWN_BIAS)
        own = parameter_of(self, OWN_BIAS)
        if own is None or not (before is not None or self._with_biases(adapters)):
            return {}
        start = own if before is None else before.to(own.device)
        alone = [(n, f) for n, f in adapters if n in self.lora_slots]
        only = self.lora_slots[alone[0][0]] if len(alone) == 1 and alone[0][1] == 1.0 else None
        if only is not None and only.bias and not only.lora_bias:
            copy = self.lora_tensors(alone[0][0])[OWN_BIAS]
            merged = full_tensor(copy).detach().to(own.device, own.dtype, copy=True)
            return {OWN_BIAS: in_place_of(own, merged)}
        wide = start.to(torch.promote_types(own.dtype, torch.float32))
        change = self._change(adapters, wide)
        total = wide if change is None else wide + full_tensor(change)
        return {OWN_BIAS: in_place_of(own, total.to(own.dtype, copy=True))}

    def _with_biases(self, adapters: Weights) -> list[tuple[str, float]]:
        biased = self.lora_routing.biased
        return [pair for pair in adapters if pair[0] in biased and pair[0] in self.lora_slots]

    def _change(self, adapters: Weights, base: torch.Tensor | None) -> torch.Tensor | None:
        """Return what adapters add for their biases, or None.

        Args:
            adapters: The adapters, with their factors.
            base: The base's own bias, if there is one.
        """
        total: torch.Tensor | None = None
        for name, factor in self._with_biases(adapters):
            config, tensors = self.lora_slots[name], self.lora_tensors(name)
            parts = []
            if config.bias:
                assert base is not None
                own = to_local(tensors[OWN_BIAS])
                parts.append((own - base.to(own)) * factor)
            if config.lora_bias:
                parts.append(to_local(tensors[LORA_BIAS]) * (config.scaling * factor))
            for part in parts:
                total = part if total is None else total + part
        return total

    def lora_with_biases(self, y: torch.Tensor) -> torch.Tensor:
        """Return the output with what the adapters in use add for their biases."""
        live = self.lora_routing.now().live
        change = self._change(live, self._base_bias()) if self._with_biases(live) else None
        return y if change is None else y + self.lora_as_output(change, y)

    def lora_bias_of(self, adapter: str, y: torch.Tensor) -> torch.Tensor | None:
        """Return what one adapter adds to an output for its biases, or None."""
        change = self._change(((adapter, 1.0),), self._base_bias())
        return None if change is None else self.lora_as_output(change, y)

    def lora_as_output(self, bias: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return a bias as it is added to an output, of which the last dimension is its own."""
        return bias.to(y.device, y.dtype)

    def _base_bias(self) -> Any:
        own = parameter_of(self, OWN_BIAS)
        # the replicas of nn.DataParallel keep theirs as plain attributes
        own = self.__dict__.get(OWN_BIAS) if own is None else own
        return None if own is None else to_local(own)
