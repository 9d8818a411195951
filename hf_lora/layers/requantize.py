"""Merging into packed weights: unpacked, added to, rounded to 4 bits again; and what is lost."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from hf_lora.compat import bitsandbytes
from hf_lora.functional.low_rank import Product, plus_products
from hf_lora.functional.packed import PackedStack, as_packed, pack_matrix
from hf_lora.layers.choice import Weights
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.replaced import Replaced, Tensors

if TYPE_CHECKING:
    from hf_lora.layers.factors import Factored


class Loss(NamedTuple):
    """How far a merged layer is from what it should be, squared Frobenius norms."""

    error: float
    change: float

    @property
    def share(self) -> float:
        """The error in units of the update; 1 is what leaving the update out would give."""
        return (self.error / self.change) ** 0.5 if self.change else 0.0


def requantize_fault(layer: "Factored") -> str | None:
    """Return why a layer's weights cannot be packed again, or None."""
    for name in _names(layer):
        weight = parameter_of(layer, name)
        four_bit = weight is not None and bitsandbytes.is_four_bit(weight)
        if weight is None or not (four_bit or isinstance(weight, PackedStack)):
            return (
                f"its {name} is not in 4 bits of bitsandbytes, the only ones that are packed again"
            )
        if four_bit and bitsandbytes.four_bit(weight) is None:
            return f"its {name} is packed for inference"
    if any(config.bias or config.lora_bias for config in layer.lora_slots.values()):
        return "an adapter has a bias there"
    return None


@torch.no_grad()
def requantized(
    layer: "Factored", adapters: Weights, replaced: Replaced | None
) -> tuple[Tensors, Loss]:
    """Return the packed weights with the sum of the adapters' updates, and what is lost."""
    here = [each for each in adapters if each[0] in layer.lora_slots]
    products = [layer.lora_scaled_products(*each) for each in here]
    made: Tensors = {}
    error = change = 0.0
    for name in _names(layer):
        updates = [found[name] for found in products if name in found]
        before = None if replaced is None else replaced.read(name)
        weight = parameter_of(layer, name) if before is None else before
        if not updates and before is None:
            continue
        assert weight is not None
        is_stack = isinstance(weight, PackedStack)
        made[name], loss = _stack(weight, updates) if is_stack else _matrix(weight, updates)
        lost, moved = loss
        error, change = error + lost, change + moved
    return made, Loss(error, change)


def _names(layer: "Factored") -> tuple[str, ...]:
    return layer.lora_parts(layer) or layer.lora_weights


def _matrix(weight: torch.Tensor, updates: list[Product]) -> tuple[torch.nn.Parameter, Loss]:
    start = bitsandbytes.four_bit(weight)
    assert start is not None
    total = plus_products(start.float(), updates)
    made = bitsandbytes.packed_like(weight, total)
    after = bitsandbytes.four_bit(made)
    assert after is not None
    return made, _loss(start, total, after)


def _stack(weight: PackedStack, updates: list[Product]) -> tuple[torch.nn.Parameter, Loss]:
    """One expert at a time: the stack is never there as a whole."""
    data, error, change = torch.empty_like(weight.data), 0.0, 0.0
    made = as_packed(data, weight.packing)
    for e in range(len(weight)):
        start = weight.matrix(e)
        own = [Product(u.left[e : e + 1], u.right[e : e + 1]) for u in updates]
        total = plus_products(start.float(), own)
        pack_matrix(total.to(start.dtype), weight.packing, data[e])
        lost, moved = _loss(start, total, made.matrix(e))
        error, change = error + lost, change + moved
    return made, Loss(error, change)


def _loss(start: torch.Tensor, total: torch.Tensor, after: torch.Tensor) -> Loss:
    error = (after.float() - total).square().sum(dtype=torch.float64)
    change = (total - start.float()).square().sum(dtype=torch.float64)
    return Loss(float(error), float(change))
