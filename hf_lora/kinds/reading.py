"""LoRA on layers whose weights are read: ``nn.MultiheadAttention``, and those of encoder layers.

An attention's update is one of its ``in_proj_weight``, of q, k and v together, and another of its
``out_proj``, as PEFT has them. Legend: E width.
"""

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from hf_lora.functional.low_rank import Product, plus_products, product
from hf_lora.kinds.lora import LOW_RANK, LoRALayer
from hf_lora.layers.factors import Factored
from hf_lora.layers.hosts import is_float_weight, taken_names
from hf_lora.layers.kind import Patched, parameter_of
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import DEFAULT, LORA_A, LORA_B
from hf_lora.layers.reading import OUT, is_attention, read_once, reader
from hf_lora.layers.roles import BESIDE, OWN_BIAS, Role, Shapes
from hf_lora.layers.trained import stored

IN = "in_proj_weight"


def _with_updates(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight with the updates of the adapters in use, summed up as a merge does."""
    live = [(name, f) for name, f in layer.lora_routing.now().live if name in layer.lora_slots]
    if not live:
        return weight
    of = layer.lora_weights[0]
    return plus_products(weight, [layer.lora_scaled_products(*each)[of] for each in live])


def _with_biases(layer: "ReadLinear", bias: torch.Tensor) -> torch.Tensor:
    return layer.lora_with_biases(bias) if layer.lora_routing.biased else bias


class ReadLinear(LoRALayer):
    """Mixin for a linear layer that is called in one mode, and whose tensors are read in another.

    Called, it computes as any; its weight and bias read as they are with the updates in use.
    """

    weight = reader("weight", _with_updates)
    bias = reader(OWN_BIAS, _with_biases)

    def lora_own(self, name: str) -> Any:
        """Return the base's own weight or bias."""
        return None if parameter_of(self, name) is None and name not in self.__dict__ else stored(
            self, name)  # fmt: skip

    def lora_base(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the host's output alone."""
        x = args[0] if args else kwargs[self.lora_input]
        return nn.functional.linear(x, self.lora_own("weight"), self.lora_own(OWN_BIAS))


class OutProjection(ReadLinear):
    """Mixin for the last layer of an ``nn.MultiheadAttention``, which is read and never called."""

    def lora_roles(self, adapter: str) -> tuple[Role, ...]:
        """Return its roles, under PEFT's keys, where the attention around it is wrapped first."""
        inside = f"{BESIDE}base_layer.{OUT}."
        return tuple(role._replace(key=inside + role.key) for role in super().lora_roles(adapter))

    def lora_how(self, grouped: Set[nn.Module]) -> str | None:
        """Return None: it is not called."""
        return None


class LoRAAttention(Factored):
    """Mixin for an ``nn.MultiheadAttention``: q, k and v have one A, and B has rows for each.

    Only ``in_proj_weight`` is updated here; see :class:`OutProjection`.
    """

    lora_layout = LOW_RANK
    lora_weights = (IN,)

    @classmethod
    def lora_bias_fault(cls, host: nn.Module, config: LayerConfig) -> str | None:
        """Return why an attention cannot have what is asked for: its weights are read, or None."""
        if config.dropout:
            return (
                "its weights are read, so that there is no input to drop elements of: say "
                "overrides={...: {'dropout': 0}} for it"
            )
        return super().lora_bias_fault(host, config)

    @classmethod
    def lora_takes(cls, host: nn.Module) -> bool:
        """Say whether a module is PyTorch's own attention."""
        return is_attention(host)

    @classmethod
    def lora_fault(cls, host: nn.Module) -> str | None:
        """Return why an attention cannot be adapted, or None."""
        name = type(host).__name__
        weight = parameter_of(host, IN)
        if weight is None:
            return (
                f"this {name} has a weight for each of q, k and v, of other widths (kdim, vdim), "
                "for which PEFT's format has no names; train it in full (train=[...])"
            )
        if not isinstance(host, Patched) and not is_float_weight(weight):
            return f"the {IN} of this {name} is not there yet, or packed or quantized"
        if not isinstance(host, Patched) and taken_names(host, DEFAULT, (LORA_A, LORA_B)):
            return f"{name} has a {LORA_A} already: another library's adapter is on it"
        return None

    @classmethod
    def lora_rank_fault(cls, host: nn.Module, r: int) -> str | None:
        """Return what is wrong with a rank: it is at most the width."""
        assert isinstance(host, nn.MultiheadAttention)
        most = host.embed_dim
        return f"r={r} is larger than the attention's width, {most}" if r > most else None

    @classmethod
    def lora_shapes(cls, host: nn.Module, config: LayerConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A (R, E) and B (3E, R)."""
        assert isinstance(host, nn.MultiheadAttention)
        return {LORA_A: (config.r, host.embed_dim), LORA_B: (3 * host.embed_dim, config.r)}

    @classmethod
    def lora_fit_fault(cls, host: nn.Module, shapes: Shapes) -> str | None:
        """Return how the widths differ, or None."""
        here = cls.lora_shapes(host, LayerConfig(r=shapes[LORA_A][0], alpha=1.0))
        if here != dict(shapes):
            return f"the adapter has {dict(shapes)}, for this attention that would be {here}"
        return None

    @classmethod
    def lora_products(
        cls, host: nn.Module, config: LayerConfig, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Product]:
        """Return the update of the weight of q, k and v."""
        return {IN: product(tensors[LORA_A], tensors[LORA_B], config.scaling)}

    def lora_merge_fault(self) -> str | None:
        """Return why updates cannot be put into the weight, or None."""
        weight = parameter_of(self, IN)
        if weight is None or weight.is_meta or not is_float_weight(weight, shards=False):
            return f"its {IN} is not in memory, or spread over several processes"
        return None

    in_proj_weight = reader(IN, _with_updates)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the host computes with the updated weights."""
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with read_once():
            return super().forward(*args, **kwargs)
