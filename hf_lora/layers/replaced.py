"""Putting tensors in the places of a module's own, and putting its own back.

A merge never writes into the base's tensor: it puts a new Parameter in its place and keeps
the old one. So unmerging gives back the very object, bytes and all, however often; and a weight
that is tied to another module is untied by the merge instead of changing both. Of a weight that
accelerate keeps elsewhere it is the entry in that store that is exchanged, in the same way.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from hf_lora.compat.offload_stores import OffloadEntry, entry_of

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
                put(self.module, {name: in_place_of(now, value)})
        for name, now in standing(self.module, self.tensors).items():
            before = self.tensors[name]
            entry = entry_of(self.module, name) if now.is_meta else None
            if entry is not None:
                entry.replace(before)
                continue
            if (now.device, now.dtype) != (before.device, before.dtype):
                before.data = before.data.to(now.device, now.dtype)
            put(self.module, {name: before})


def standing(module: nn.Module, names: Iterable[str]) -> Tensors:
    """Return the tensors that stand now where those of these names would be put."""
    found = {name: module._parameters.get(name, module._buffers.get(name)) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def put(module: nn.Module, tensors: Tensors) -> None:
    """Put tensors in their places on the module."""
    for name, tensor in tensors.items():
        store = module._parameters if name in module._parameters else module._buffers
        store[name] = tensor  # type: ignore[assignment]


def in_place_of(original: torch.Tensor, data: torch.Tensor) -> nn.Parameter:
    """Return a Parameter that carries whatever other libraries have noted on the original."""
    parameter = nn.Parameter(data, original.requires_grad)
    vars(parameter).update(vars(original))
    return parameter
