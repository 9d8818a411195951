"""Kinds of layers whose update is made of two factors, A and B, one of which starts at zero."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from hf_lora.compat.deepspeed import shape_of
from hf_lora.compat.dtensor import full_tensor, is_distributed
from hf_lora.functional.fused import Update
from hf_lora.functional.init import init_low_rank
from hf_lora.functional.low_rank import Product, dense
from hf_lora.layers.choice import Weights
from hf_lora.layers.host_first import HostFirst
from hf_lora.layers.kind import Adaptable
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.merge import merged_weight, not_finite, weight_fault
from hf_lora.layers.meta import set_full
from hf_lora.layers.names import parameter_name
from hf_lora.layers.patched import host_view
from hf_lora.layers.replaced import Replaced, Tensors
from hf_lora.layers.roles import FACTOR_A, FACTOR_B, Role
from hf_lora.layers.tensor_parallel import to_local


class Factored(Adaptable):
    """Mixin that keeps two factors for each adapter, under the roles of its layout."""

    lora_zero = 1
    """Which of the two starts at zero, so that the layer begins as its base."""

    @classmethod
    def lora_init(cls, factors: Sequence[torch.Tensor], method: str) -> None:
        """Fill A and B in place, as an adapter starts.

        Args:
            factors: A and B.
            method: As a configuration says.
        """
        a, b = factors
        init_low_rank(a, b, method)

    @classmethod
    def lora_product_fault(cls, host: nn.Module) -> str | None:
        """Return why an update is no product that is added to a tensor of the host, or None."""
        return None

    def lora_start(self, factors: Sequence[torch.Tensor], config: LayerConfig, method: str) -> None:
        """Fill all factors that an adapter of these numbers has here, as it starts."""
        self.lora_init(factors, method)

    def lora_names_of(self, adapter: str, config: LayerConfig) -> tuple[str, ...]:
        """Return the names that an adapter of these numbers has its factors under."""
        return self.lora_held(adapter)

    def lora_held(self, adapter: str) -> tuple[str, ...]:
        """Return the names of an adapter's factors on this module."""
        return tuple(parameter_name(role, adapter) for role in self.lora_layout.roles)

    def lora_add(
        self,
        adapter: str,
        config: LayerConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        init: str | None,
    ) -> None:
        """Give the layer the factors of an adapter; ``init=None`` leaves them unfilled."""
        shapes = self.lora_shapes(self, config).values()
        factors = [nn.Parameter(torch.empty(s, dtype=dtype, device=device)) for s in shapes]
        if init is not None:
            self.lora_start(factors, config, init)
        for held, factor in zip(self.lora_names_of(adapter, config), factors, strict=True):
            self.lora_hold(held, factor)
        self.lora_slots[adapter] = config
        self.lora_routing.starts[adapter] = init or "kaiming"
        self.lora_routing.names.add(adapter)

    def lora_draw(self, names: set[str]) -> None:
        """Draw factors anew: as they started, since what they were is lost."""
        for adapter, config in self.lora_slots.items():
            held = self.lora_held(adapter)
            if names & set(held):
                drawn = [torch.empty(s) for s in self.lora_shapes(self, config).values()]
                self.lora_start(drawn, config, self.lora_routing.starts[adapter])
                factors = self.lora_factors(adapter)
                for key, factor, value in zip(held, factors, drawn, strict=True):
                    if key in names:
                        set_full(factor, value)

    def lora_remove(self, adapter: str) -> None:
        """Take the factors of an adapter away."""
        names = self.lora_held(adapter)
        del self.lora_slots[adapter]
        for held in names:
            delattr(self, held)

    def lora_factors(self, adapter: str) -> tuple[nn.Parameter, ...]:
        """Return all factors of an adapter."""
        return self.lora_pair(adapter)

    def lora_pair(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A and B of an adapter."""
        a, b = (getattr(self, held) for held in self.lora_held(adapter))
        return a, b

    def lora_local(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what this process has of A and B of an adapter."""
        a_RI, b_OR = self.lora_pair(adapter)
        return to_local(a_RI), to_local(b_OR)

    def lora_updates(self) -> list[Update]:
        """Return the updates of the active adapters, as things are at this moment."""
        training = self.training
        return [
            Update(*self.lora_local(name), slot.scaling * factor, slot.dropout if training else 0.0)
            for name, factor in self.lora_routing.now().live
            if (slot := self.lora_slots.get(name)) is not None
        ]

    def lora_roles(self, adapter: str) -> tuple[Role, ...]:
        """Return A and B, in this order."""
        shapes = self.lora_shapes(self, self.lora_slots[adapter])
        groups = (FACTOR_A, FACTOR_B)
        return tuple(
            Role(role, held, shapes[role], self.lora_layout.key(role), group)
            for role, held, group in zip(shapes, self.lora_held(adapter), groups, strict=True)
        )

    def lora_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return role to what this process has of A and B."""
        return dict(zip(self.lora_layout.roles, self.lora_factors(adapter), strict=True))

    def lora_added(self) -> set[str]:
        """Return the names of the factors that this layer has."""
        return {held for adapter in self.lora_slots for held in self.lora_held(adapter)}

    def lora_misfit(self) -> str | None:
        """Return whether the host has other sizes now, or None."""
        for adapter, config in self.lora_slots.items():
            now = self.lora_shapes(self, config)
            for (role, shape), factor in zip(now.items(), self.lora_factors(adapter), strict=True):
                if shape_of(factor) != shape:
                    return f"has other sizes now ({role} would be {shape}) than its adapter"
        return None

    def lora_delta(self, name: str) -> torch.Tensor:
        """Return an adapter's update of the weight, float32, in the weight's own layout.

        A class whose update is no product says here what it is.
        """
        update = self.lora_scaled_products(name, 1.0)[self.lora_weights[0]]
        weight = self._parameters.get(self.lora_weights[0])
        delta_OI = dense(update)
        # packed ones have a shape of their own, and of DTensors there is no view
        return delta_OI if weight is None or weight.dim() <= 2 else delta_OI.view(weight.shape)

    @classmethod
    def lora_has_products(cls) -> bool:
        """Say whether its updates are products, and none is said by the class in another way."""
        return cls.lora_delta is Factored.lora_delta

    def lora_scaled_products(self, name: str, factor: float) -> dict[str, Product]:
        """Return an adapter's updates, times a factor: name of the weight to product."""
        config, tensors = self.lora_slots[name], self.lora_tensors(name)
        updates = self.lora_products(self, config, tensors).items()
        return {weight: Product(each.left * factor, each.right) for weight, each in updates}

    def lora_products_to_come(
        self, adapters: Weights, replaced: Replaced | None
    ) -> dict[str, list[Product]] | None:
        """Return what a merge adds to each weight, if it is here with no adapter inside yet."""
        found: dict[str, list[Product]] = {}
        here = [(adapter, factor) for adapter, factor in adapters if adapter in self.lora_slots]
        for name in self.lora_parts(self) or self.lora_weights:
            weight = self._parameters.get(name)
            before = None if replaced is None else replaced.read(name)
            if weight is None or weight.is_meta or is_distributed(weight) or before is not None:
                return None
            found[name] = []
        if not self.lora_has_products():
            return None
        for each in here:
            for name, update in self.lora_scaled_products(*each).items():
                if name in found:
                    found[name].append(Product(*map(full_tensor, update)))
        return {name: updates for name, updates in found.items() if updates}

    def lora_changes(self, adapter: str, weight: str) -> bool:
        """Say whether an adapter has an update of one of the layer's weights."""
        return adapter in self.lora_slots

    def lora_merge_fault(self) -> str | None:
        """Return why updates cannot be put into the weight, or None."""
        return weight_fault(self)

    def lora_merged(self, adapters: Weights, replaced: Replaced | None) -> Tensors:
        """Return the weight with the sum of the adapters' updates."""
        merged: Tensors = {}
        for name in self.lora_parts(self) or self.lora_weights:
            before = None if replaced is None else replaced.read(name)
            if before is not None or any(self.lora_changes(n, name) for n, _ in adapters):
                merged |= merged_weight(self, name, adapters, before)
        return merged

    def lora_merge_damage(self, merged: Tensors) -> str | None:
        """Return how many values are not finite that were, or None."""
        return not_finite(self, merged)

    def lora_is_at_start(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Say whether the factor that starts at zero is zero."""
        return not tensors[self.lora_layout.roles[self.lora_zero]].any()

    @HostFirst
    def r(self) -> int:
        """Rank of the active adapter."""
        return _shown(self)[0].r

    @HostFirst
    def alpha(self) -> float:
        """Strength of the active adapter."""
        return _shown(self)[0].alpha

    @HostFirst
    def scaling(self) -> float:
        """The factor that the active adapter's update is multiplied by."""
        slot, factor = _shown(self)
        return slot.scaling * factor

    @HostFirst
    def base(self) -> nn.Module:
        """The frozen layer on its own: the host's class on the same parameters, without LoRA."""
        return host_view(self)

    def extra_repr(self) -> str:
        """Show the host's own line, then each adapter's rank and strength."""
        shown = ", ".join(f"{n}: r={s.r}, alpha={s.alpha:g}" for n, s in self.lora_slots.items())
        return ", ".join(filter(None, (super().extra_repr(), f"lora=({shown})")))


def _shown(layer: Factored) -> tuple[LayerConfig, float]:
    """Return the numbers of the first active adapter that the layer has, else of its first.

    And what its update is multiplied by beside them.
    """
    for name, factor in (*layer.lora_routing.now().chosen, *((n, 1.0) for n in layer.lora_slots)):
        if name in layer.lora_slots:
            return layer.lora_slots[name], factor
    raise AttributeError("this layer has no adapter")
