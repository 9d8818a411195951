"""Putting updates into a weight and taking them out again, one layer at a time.

A merge never writes into the base's tensor: it puts a new Parameter in its place and keeps
the old one. So unmerging gives back the very object, bytes and all, however often; and a weight
that is tied to another module is untied by the merge instead of changing both.
"""

import torch
from torch import nn

from hf_lora.layers.base import LoRALayer
from hf_lora.layers.hosts import has_float_weight
from hf_lora.layers.trained import TrainedModule

Originals = dict[str, nn.Parameter | torch.Tensor]
"""Name of a tensor of the module to what stood there before the merge."""


def merge_fault(layer: LoRALayer) -> str | None:
    """Return why updates cannot be put into this layer's weight, or None."""
    if not has_float_weight(layer):
        return f"its base ({layer.lora_host.__name__}) holds a quantized or packed weight"
    return None


@torch.no_grad()
def merge_layer(layer: LoRALayer, adapters: tuple[str, ...]) -> Originals:
    """Put the sum of the adapters' updates into the weight, in float32, rounded once.

    Returns:
        What stood there before, for :func:`put_back`.
    """
    names = [name for name in adapters if name in layer.lora_slots]
    weight = layer._parameters["weight"]
    assert weight is not None
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for name in names:
        total += layer.lora_delta(name).to(total.device, total.dtype)
    layer._parameters["weight"] = nn.Parameter(total.to(weight.dtype), weight.requires_grad)
    return {"weight": weight}


@torch.no_grad()
def merge_copies(module: TrainedModule, adapter: str) -> Originals:
    """Put the adapter's trained copies in the place of the module's own tensors."""
    originals: Originals = {}
    for name, copy in module.lora_copy(adapter).items():
        store = module._parameters if name in module._parameters else module._buffers
        original = store[name]
        assert original is not None
        originals[name] = original
        data = copy.detach().clone()
        store[name] = (  # type: ignore[assignment]
            nn.Parameter(data, original.requires_grad)
            if isinstance(original, nn.Parameter)
            else data
        )
    return originals


def put_back(module: nn.Module, originals: Originals) -> None:
    """Undo a merge: the tensors that stood there before stand there again."""
    for name, original in originals.items():
        store = module._parameters if name in module._parameters else module._buffers
        now = store[name]
        if now is not None and now.device != original.device:
            original.data = original.data.to(now.device)  # the model moved while it was merged
        store[name] = original  # type: ignore[assignment]
