"""Putting low-rank updates into a weight: one sum in float32, rounded once."""

import math
from typing import TYPE_CHECKING

import torch

from hf_lora.compat.dtensor import full_tensor, is_distributed, is_sharded
from hf_lora.compat.offload_stores import entry_of
from hf_lora.functional.low_rank import Product, plus_products
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


def merged_weight(
    layer: "Factored", name: str, adapters: Weights, base: torch.Tensor | None = None
) -> Tensors:
    """Return a weight plus the sum of the adapters' updates of it, in float32, rounded once.

    Args:
        layer: The layer.
        name: What the layer calls the weight.
        adapters: What to add.
        base: What to add it to, if other adapters are inside the layer's own weight already.
    """
    weight = layer._parameters[name]
    assert weight is not None
    start = weight if base is None else base.to(weight.device)
    merged = with_updates(layer, start, adapters, name).to(weight.dtype)
    return {name: in_place_of(weight, merged)}


@torch.no_grad()
def with_updates(
    layer: "Factored", weight: torch.Tensor, adapters: Weights, name: str = "weight"
) -> torch.Tensor:
    """Return any weight plus the sum of the adapters' updates of the one that has this name."""
    here = [(adapter, factor) for adapter, factor in adapters if adapter in layer.lora_slots]
    if layer.lora_has_products() and not is_sharded(weight):
        found = (layer.lora_scaled_products(*each).get(name) for each in here)
        updates = [Product(*map(full_tensor, each)) for each in found if each is not None]
        return plus_products(weight.detach(), updates)
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for adapter, factor in here:
        delta = layer.lora_delta(adapter).to(total.device, total.dtype) * factor
        total += delta if is_sharded(total) else full_tensor(delta)
    return total.to(weight.dtype)


def not_finite(layer: Patched, merged: Tensors) -> str | None:
    """Return what is wrong with merged weights that the base's were not already, or None."""
    problems = []
    for name, after in merged.items():
        before = layer._parameters[name]
        assert before is not None
        if not _surely_finite(after):
            bad = int((~torch.isfinite(after) & torch.isfinite(before)).sum())
            where = "" if len(merged) == 1 else f" of {name}"
            problems += [f"{bad} merged values{where} are not finite in {after.dtype}"] * (bad > 0)
    return "; ".join(problems) or None


def _surely_finite(tensor: torch.Tensor) -> bool:
    """Look at the ends alone, in one pass over memory: nan goes through to both."""
    if is_sharded(tensor) or not tensor.numel():
        return False
    return all(math.isfinite(end) for end in torch.stack(tensor.detach().aminmax()).tolist())
