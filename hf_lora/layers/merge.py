"""Putting updates into a weight and taking them out again, one layer at a time.

A merge never writes into the base's tensor: it puts a new Parameter in its place and keeps
the old one. So unmerging gives back the very object, bytes and all, however often; and a weight
that is tied to another module is untied by the merge instead of changing both. Of a weight that
accelerate keeps elsewhere it is the entry in that store that is exchanged, in the same way.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from hf_lora.compat.dtensor import full_tensor, is_distributed, is_sharded
from hf_lora.compat.offload_stores import OffloadEntry, entry_of
from hf_lora.layers.choice import Weights
from hf_lora.layers.hosts import has_float_weight
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.lora import LoRALayer
from hf_lora.layers.probe import is_linear_in_its_weight
from hf_lora.layers.tensor_parallel import split_of
from hf_lora.layers.trained import TrainedModule, mixture, own_tensors

Tensors = dict[str, nn.Parameter | torch.Tensor]
"""Name of a tensor of the module to a tensor that stood, or shall stand, there."""


@dataclasses.dataclass
class Replaced:
    """A module that a merge changes, and what stood there before."""

    module: nn.Module
    tensors: Tensors = dataclasses.field(default_factory=dict)
    entries: dict[str, OffloadEntry] = dataclasses.field(default_factory=dict)
    """Of those that are offloaded: what the store held."""

    def read(self, name: str) -> torch.Tensor | None:
        """Return the tensor of this name that stood there before, if it was exchanged."""
        entry = self.entries.get(name)
        return self.tensors.get(name) if entry is None else entry.read()

    def replace(self, merged: Tensors) -> None:
        """Put these tensors in the places of the module's own; :meth:`put_back` undoes it.

        Raises:
            SaveError: One cannot be written to the store that the module's tensors are kept in.
        """
        for name, before in standing(self.module, merged).items():
            entry = entry_of(self.module, name) if before.is_meta else None
            # remembered first: whatever interrupts the next line, what stood there can be put back
            if entry is None:
                self.tensors[name] = before
                put(self.module, {name: merged[name]})
            else:
                self.entries[name] = entry
                entry.replace(merged[name])

    def stored(self) -> Iterator[OffloadEntry]:
        """Yield the entries of stores that :meth:`put_back` would change."""
        yield from self.entries.values()
        for name, now in standing(self.module, self.tensors).items():
            entry = entry_of(self.module, name) if now.is_meta else None
            if entry is not None:
                yield entry

    def put_back(self) -> None:
        """Undo a merge: the tensors that stood there before stand there again.

        If the model was moved, cast or offloaded meanwhile they follow, as they would have if they
        had been in it.
        """
        for name, now in standing(self.module, self.entries).items():
            self.entries[name].put_back()
            if not now.is_meta:
                value = self.entries[name].read().to(now.device, now.dtype)
                put(self.module, {name: _in_place_of(now, value)})
        for name, now in standing(self.module, self.tensors).items():
            before = self.tensors[name]
            entry = entry_of(self.module, name) if now.is_meta else None
            if entry is not None:
                entry.replace(before)
                continue
            if (now.device, now.dtype) != (before.device, before.dtype):
                before.data = before.data.to(now.device, now.dtype)
            put(self.module, {name: before})


def merge_fault(layer: LoRALayer) -> str | None:
    """Return why updates cannot be put into this layer's weight, or None."""
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
    if not is_linear_in_its_weight(layer):
        return (
            f"the forward of its base ({name}) is not x Wᵀ + b, so W + s·B A would not do the same"
        )
    return None


@torch.no_grad()
def merged_weight(layer: LoRALayer, adapters: Weights, base: torch.Tensor | None = None) -> Tensors:
    """Return the weight plus the sum of the adapters' updates, in float32, rounded once.

    Args:
        layer: The layer.
        adapters: What to add.
        base: What to add it to, if other adapters are inside the layer's own weight already.
    """
    weight = layer._parameters["weight"]
    assert weight is not None
    start = weight if base is None else base.to(weight.device)
    return {"weight": _in_place_of(weight, with_updates(layer, start, adapters).to(weight.dtype))}


@torch.no_grad()
def with_updates(layer: LoRALayer, weight: torch.Tensor, adapters: Weights) -> torch.Tensor:
    """Return any weight plus the sum of the adapters' updates, in float32, rounded once."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for name, factor in adapters:
        if name in layer.lora_slots:
            delta = layer.lora_delta(name).to(total.device, total.dtype) * factor
            total += delta if is_sharded(total) else full_tensor(delta)
    return total.to(weight.dtype)


@torch.no_grad()
def merged_copies(module: TrainedModule, adapters: Weights) -> Tensors:
    """Return the adapters' trained copies, to stand in the place of the module's own tensors."""
    shares = [(module.lora_copy(name), factor) for name, factor in module.lora_shares(adapters)]
    merged: Tensors = {}
    for name, tensor in own_tensors(module, tuple(shares[0][0]) if shares else ()):
        copies = [(full_tensor(copies[name].detach()), factor) for copies, factor in shares]
        one = len(copies) == 1 and copies[0][1] == 1.0
        data = copies[0][0].clone() if one else mixture(full_tensor(tensor.detach()), copies)
        original = parameter_of(module, name)
        data = data.to(tensor.dtype)
        merged[name] = data if original is None else _in_place_of(original, data)
    return merged


def not_finite(layer: LoRALayer, merged: Tensors) -> str | None:
    """Return what is wrong with a merged weight that the base's was not already, or None."""
    before, after = layer._parameters["weight"], merged["weight"]
    assert before is not None
    bad = ~torch.isfinite(after) & torch.isfinite(before)
    if bad.any():
        return f"{int(bad.sum())} merged values are not finite in {after.dtype}"
    return None


def standing(module: nn.Module, names: Iterable[str]) -> Tensors:
    """Return the tensors that stand now where those of these names would be put."""
    found = {name: module._parameters.get(name, module._buffers.get(name)) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def put(module: nn.Module, tensors: Tensors) -> None:
    """Put tensors in their places on the module."""
    for name, tensor in tensors.items():
        store = module._parameters if name in module._parameters else module._buffers
        store[name] = tensor  # type: ignore[assignment]


def _in_place_of(original: torch.Tensor, data: torch.Tensor) -> nn.Parameter:
    """Return a Parameter that carries whatever other libraries have noted on the original."""
    parameter = nn.Parameter(data, original.requires_grad)
    vars(parameter).update(vars(original))
    return parameter
