"""Putting low-rank updates into a weight: one sum in float32, rounded once."""

from typing import TYPE_CHECKING

import torch

from hf_lora.compat.dtensor import full_tensor, is_distributed, is_sharded
from hf_lora.compat.offload_stores import entry_of
from hf_lora.layers.choice import Weights
from hf_lora.layers.hosts import has_float_weight
from hf_lora.layers.kind import Patched, parameter_of
from hf_lora.layers.replaced import Tensors, in_place_of
from hf_lora.layers.tensor_parallel import split_of

if TYPE_CHECKING:
    from hf_lora.layers.factors import Factored


def weight_fault(layer: Patched) -> str | None:
    """Return why nothing can be put into this layer's weight, or None."""
    name = layer.lora_host.__name__
    weight, split = parameter_of(layer, "weight"), split_of(layer)
    # what tensor parallelism has split stays where it is, and its factors are split alike
    if is_distributed(weight) and (split is None or weight.device_mesh != split.mesh):  # type: ignore[union-attr]
        return "its weight is spread over several processes"
    if weight is not None and weight.is_meta and entry_of(layer, "weight") is None:
        return "its weight is not in memory, nor in a store from which accelerate fetches it alone"
    if weight is None:
        return f"its base ({name}) computes its weight from other tensors, or keeps it elsewhere"
    if not has_float_weight(layer):
        return f"its base ({name}) holds a quantized or packed weight"
    return None


@torch.no_grad()
def merged_weight(
    layer: "Factored", adapters: Weights, base: torch.Tensor | None = None
) -> Tensors:
    """Return the weight plus the sum of the adapters' updates, in float32, rounded once.

    Args:
        layer: The layer.
        adapters: What to add.
        base: What to add it to, if other adapters are inside the layer's own weight already.
    """
    name = layer.lora_weights[0]
    weight = layer._parameters[name]
    assert weight is not None
    start = weight if base is None else base.to(weight.device)
    return {name: in_place_of(weight, with_updates(layer, start, adapters).to(weight.dtype))}


@torch.no_grad()
def with_updates(layer: "Factored", weight: torch.Tensor, adapters: Weights) -> torch.Tensor:
    """Return any weight plus the sum of the adapters' updates, in float32, rounded once."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for name, factor in adapters:
        if name in layer.lora_slots:
            delta = layer.lora_delta(name).to(total.device, total.dtype) * factor
            total += delta if is_sharded(total) else full_tensor(delta)
    return total.to(weight.dtype)


def not_finite(layer: Patched, merged: Tensors) -> str | None:
    """Return what is wrong with a merged weight that the base's was not already, or None."""
    name = layer.lora_weights[0]
    before, after = layer._parameters[name], merged[name]
    assert before is not None
    bad = ~torch.isfinite(after) & torch.isfinite(before)
    if bad.any():
        return f"{int(bad.sum())} merged values are not finite in {after.dtype}"
    return None
