"""A base that stays on disk: the model's modules without data, and where each tensor is stored."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from hf_lora.adapter_io.base_check import NO_ROWS, Rows, base_differences, take_fingerprint
from hf_lora.adapter_io.base_loading import choose_class
from hf_lora.adapter_io.base_weights import BaseTensors
from hf_lora.adapter_io.labels import label_arguments
from hf_lora.adapter_io.loaded_base import LoadedBase, same_values
from hf_lora.adapter_io.rename import Renaming
from hf_lora.adapter_io.token_rows import make_room
from hf_lora.adapter_io.vocabulary import fit_vocabulary
from hf_lora.compat.checkpoint_names import converted
from hf_lora.compat.transformers import mark_filled
from hf_lora.errors import BaseLoadError
from hf_lora.file_merging.boxes import Box, Traced
from hf_lora.file_merging.checkpoint import Checkpoint
from hf_lora.files.read import AdapterFolder
from hf_lora.layers.roles import Place
from hf_lora.planning.ties import full_name


def model_without_data(
    checkpoint: Checkpoint, adapter: AdapterFolder, *, trust_remote_code: bool = False
) -> Any:
    """Return the base model that an adapter is for, all of it on the meta device.

    Raises:
        BaseLoadError: transformers does not know such a model.
        AdapterFileError: No class is known for it.
    """
    labels = label_arguments(adapter, {})
    code = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.directory, **labels, **code)
    except (OSError, ValueError) as error:
        raise BaseLoadError(f"The base {checkpoint.name} cannot be read: {error}") from error
    loader, _ = choose_class(adapter, str(checkpoint.directory), config)
    with torch.device("meta"), no_init_weights():
        if hasattr(loader, "from_config"):
            model = loader.from_config(config, **code)
        else:
            model = loader(config)
    model.tie_weights()
    fit_vocabulary(model, adapter)
    make_room(model, adapter)
    return model.eval()


class CheckpointBase(LoadedBase):
    """What an adapter's files are compared with where the base is a checkpoint on disk."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint):
        super().__init__(model)
        self.checkpoint = checkpoint
        self.tensors: dict[str, Traced]
        """Name in the model to what it is made of; tied ones under each name that is stored."""

        self.tensors, self.faults = converted(
            model, list(checkpoint.where), lambda name: Traced.of(name, checkpoint.shape(name))
        )
        self.grown: dict[int, tuple[Place, torch.Tensor]] = {}
        """What an adapter's file has of a tensor of which the checkpoint has fewer rows: id of the
        model's own, to the first place at which it stands."""

        self.asked: list[_Asked] = []
        """What was compared, and is again with what comes."""

        known = dict(model.named_parameters(remove_duplicate=False))
        for name in known.keys() & self.tensors.keys():
            mark_filled(known[name])

    def check_present(self, adapted: list[str], repeated: list[str]) -> None:
        """Do nothing: what is missing is found by its name."""

    def equals(self, place: Place, tensor: torch.Tensor) -> bool:
        """Say whether a tensor is what the checkpoint has at a place.

        Of a buffer it says no, so that it becomes the adapter's: the same bytes, if it is the same.
        """
        path, role = place
        module = self.model.get_submodule(path)
        if role in module._buffers:
            return False
        own = tensor_of(self.model, full_name(place))
        stored = next((t for n in self.names(own) if (t := self.read(n)) is not None), None)
        if stored is None:
            return False
        rows = len(stored) if stored.dim() else 0
        if rows < len(tensor) and stored.shape[1:] == tensor.shape[1:]:
            _, first = self.grown.setdefault(id(own), (place, tensor))
            if not same_values(tensor, first):
                return False
            tensor = tensor[:rows]
        return stored.shape == tensor.shape and same_values(tensor, stored)

    def names(self, tensor: torch.Tensor) -> list[str]:
        """Return all names that a tensor has in the model."""
        everything = self.model.named_parameters(remove_duplicate=False)
        return [name for name, parameter in everything if parameter is tensor]

    def differences(
        self,
        fingerprint: dict[str, Any],
        names: Renaming,
        others: Collection[str],
        rows: Rows = NO_ROWS,
    ) -> list[str]:
        """Return a line for each thing in which it is not the base of a fingerprint.

        Numbers that are not here yet are compared by :meth:`number_differences`.
        """
        here = self.checkpoint.at_hand
        self.asked.append(_Asked(fingerprint, names, others, rows, here))
        return self._differences(self.asked[-1], here)

    def number_differences(self, shard: str) -> list[str]:
        """Return the same for all that was asked, of the numbers in one file that came since."""
        waiting = [asked for asked in self.asked if shard not in asked.compared]
        return [line for asked in waiting for line in self._differences(asked, {shard})]

    def _differences(self, asked: "_Asked", shards: Collection[str]) -> list[str]:
        base = _Stored(self, shards)
        return base_differences(asked.fingerprint, base, asked.names, asked.others, asked.rows)

    def fingerprint(self, trained: Collection[str], moved: Collection[str] = ()) -> dict[str, Any]:
        """Return the fingerprint of what the checkpoint has, as an adapter's header holds it.

        Args:
            trained: Paths of the modules that an adapter has in full.
            moved: Names of tensors that are no part of the base.
        """
        return take_fingerprint(_Stored(self, self.checkpoint.at_hand), trained, moved)

    def read(self, name: str) -> torch.Tensor | None:
        """Return all of a tensor of the model; None if the checkpoint does not have all of it."""
        traced = self.tensors.get(name)
        if traced is None:
            return None
        first = self.checkpoint.dtype(traced.boxes[0].source)
        whole = torch.empty(traced.shape, dtype=first)
        for box in traced.boxes:
            where = self.checkpoint.where[box.source]
            with self.checkpoint.opened(where) as file:
                shape = self.checkpoint.shape(box.source)
                flat = self.checkpoint.numbers(file, box.source, 0, math.prod(shape))
            tensor = part = flat.view(shape)
            for axis, (begin, size) in enumerate(_sides(box, tensor)):
                part = part.narrow(axis, begin, size)
            order = [axis for axis in box.axes if axis is not None]
            part = part.permute(order).reshape(box.sizes)
            at = tuple(slice(b, b + s) for b, s in zip(box.begin, box.sizes, strict=True))
            whole[at] = part.to(first)
        return whole

    def pick(self, name: str, at: range, shards: Collection[str]) -> torch.Tensor | None:
        """Return single numbers of a tensor, float32; None if they cannot be read."""
        traced = self.tensors.get(name)
        if traced is None or not traced.boxes:
            return None
        places_of: dict[str, list[tuple[int, int]]] = {}
        for i, position in enumerate(at):
            index = _unravelled(position, traced.shape)
            places = ((box, box.find(index)) for box in traced.boxes)
            box, place = next(((b, p) for b, p in places if p is not None), (None, None))
            if box is None or place is None or self.checkpoint.where[box.source] not in shards:
                return None
            dtype = self.checkpoint.dtype(box.source)
            if not dtype.is_floating_point or dtype.itemsize < 2:
                return None
            flat = 0
            for step, size in zip(place, self.checkpoint.shape(box.source), strict=True):
                flat = flat * size + step
            places_of.setdefault(box.source, []).append((i, flat))
        values = torch.empty(len(at))
        for source, found in places_of.items():
            with self.checkpoint.opened(self.checkpoint.where[source]) as file:
                if source in self.checkpoint.packed:
                    each = (self.checkpoint.numbers(file, source, f, f + 1) for _, f in found)
                    picked = torch.cat(list(each)).float()
                else:
                    picked = file.pick(source, [flat for _, flat in found])
            values[[i for i, _ in found]] = picked
        return values


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A comparison with a fingerprint."""

    fingerprint: dict[str, Any]
    names: Renaming
    others: Collection[str]
    rows: Rows
    compared: Collection[str]
    """The files that were here then."""


class _Stored(BaseTensors):
    """A model's base tensors, of which the numbers are read from its checkpoint."""

    def __init__(self, base: CheckpointBase, shards: Collection[str]):
        super().__init__(base.model)
        self._base = base
        self._shards = shards

    def on_meta(self, names: Mapping[str, Any]) -> list[str]:
        """Return nothing: no number is looked for in the model."""
        return []

    def read(self, at: Mapping[str, range]) -> dict[str, torch.Tensor]:
        """Return the numbers at some positions of each flattened tensor, where they can be read."""
        found = {}
        for name, positions in at.items():
            names = [name, *(tied for tied, to in self.ties.items() if to == name)]
            stored = next((each for each in names if each in self._base.tensors), name)
            values = self._base.pick(stored, positions, self._shards)
            if values is not None:
                found[name] = values
        return found


def _sides(box: Box, tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Return where a box begins in its source, and how long it is there, for each axis."""
    sizes = {axis: size for axis, size in zip(box.axes, box.sizes, strict=True) if axis is not None}
    return [(box.offset[axis], sizes[axis]) for axis in range(tensor.dim())]


def _unravelled(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        position, rest = divmod(position, size)
        index.append(rest)
    return tuple(reversed(index))


def tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer by its full name."""
    path, _, role = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = module._parameters.get(role)
    found = module._buffers[role] if parameter is None else parameter
    assert found is not None
    return found
