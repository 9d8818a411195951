"""Which tensors a merged checkpoint holds, and what each of them is made of; nothing is read."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator

import torch

from hf_lora.compat.checkpoint_names import converted
from hf_lora.errors import TargetError, listing
from hf_lora.file_merging.base import CheckpointBase, tensor_of
from hf_lora.file_merging.boxes import Traced
from hf_lora.file_merging.pieces import (
    NoRectangleError,
    Piece,
    Stack,
    as_rows,
    as_stack,
    pieces,
)
from hf_lora.file_merging.updates import Update, Updates, shared_names


@dataclasses.dataclass(frozen=True)
class Part:
    """What is done to a rectangle of a stored tensor, by every adapter that does something."""

    piece: Piece
    updates: tuple[Update, ...]
    seen: Stack
    """As which stack of matrices the model's tensor is seen."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the merged checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str | None
    """The checkpoint's tensor that it begins as; None if it has none."""

    view: tuple[int, int]
    """As how many rows and columns it is seen."""

    parts: tuple[Part, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of a merge, before anything is written."""

    shards: dict[str, tuple[Entry, ...]]
    """Name of each file to its tensors, in order."""

    untied: frozenset[str]
    """Names in the model of tensors that were one with others, and are not any more."""

    added: tuple[str, ...]
    """Names of the tensors that the base's checkpoint does not have."""

    @property
    def touched(self) -> list[Entry]:
        """The tensors that adapters change."""
        return [entry for entries in self.shards.values() for entry in entries if entry.parts]


def make_plan(updates: Updates, dtype: torch.dtype | None) -> Plan:
    """Work out what each tensor of the merged checkpoint is.

    Args:
        updates: What the adapters do.
        dtype: Type of every floating-point tensor; None to keep each as it is.

    Raises:
        TargetError: Something cannot be merged into this checkpoint; one line each.
    """
    return _Planning(updates, dtype).run()


class _Planning:
    def __init__(self, updates: Updates, dtype: torch.dtype | None):
        self.updates = updates
        self.base = updates.base
        self.checkpoint = updates.base.checkpoint
        self.dtype = dtype
        self.problems = list(updates.problems)
        self.parts: dict[str, list[Part]] = {}
        """Name in the checkpoint to what is done to it."""

        self.views: dict[str, tuple[int, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.added: dict[str, tuple[str | None, tuple[Update, ...]]] = {}
        """Name of a new tensor to what it begins as, and what is done to it."""

        self.untied: set[str] = set()

    def run(self) -> Plan:
        named = dict(self.updates.named())
        for names in shared_names(self.base.model, named):
            self._resolve(names, named)
        self._check_names()
        if self.problems:
            kind = type(self.base.model).__name__
            raise TargetError(
                listing(
                    f"This cannot be merged into the checkpoint {self.checkpoint.name} ({kind})",
                    self.problems,
                    "hf_lora.from_pretrained and merge_and_unwrap merge in memory.",
                )
            )
        shards = {name: tuple(self._entries(name)) for name in self.checkpoint.tables}
        return Plan(shards, frozenset(self.untied), tuple(self.added))

    def _resolve(self, names: list[str], named: dict[str, tuple[Update, ...]]) -> None:
        """Find where the tensor with these names is stored, and note what is done to it there."""
        stored = [name for name in names if name in self.base.tensors]
        differ = len({named[name] for name in names}) > 1
        self.problems += [
            fault for n in dict.fromkeys(names) if (fault := self._clash(n, named[n]))
        ]
        if differ:
            self.untied |= set(names)
        elif not named[names[0]]:
            return
        for name in stored:
            self._note(name, named[name])
        if differ or not stored:
            for name in names if differ else names[:1]:
                if name not in stored:
                    self._add(name, stored, named[name])

    def _can_add(self, source: str) -> bool:
        dtype = self.checkpoint.dtype(source)
        return dtype.is_floating_point and dtype.itemsize > 1

    def _clash(self, name: str, updates: tuple[Update, ...]) -> str | None:
        """Return why adapters cannot be mixed here, or None."""
        if any(update.rows is not None for update in updates):
            return self._clash_of_rows(name, updates)
        copies = tuple(update for update in updates if update.shares)
        if len(copies) < 2 or math.isclose(self._share(copies), 1.0, abs_tol=1e-6):
            return None
        who = ", ".join(self.updates.adapters[update.adapter].name for update in copies)
        return (
            f"{name} is trained in full by {who}, of which only a mean can be made: factors that "
            "add up to 1"
        )

    def _clash_of_rows(self, name: str, updates: tuple[Update, ...]) -> str | None:
        who = ", ".join(self.updates.adapters[update.adapter].name for update in updates)
        if any(update.rows is None for update in updates):
            return f"{name} has trained rows and another update as well, from {who}"
        for row, having in _by_row(updates).items():
            if len(having) > 1 and not math.isclose(self._share(having), 1.0, abs_tol=1e-6):
                return (
                    f"row {row} of {name} is trained by {who}, of which only a mean can be made: "
                    "factors that add up to 1"
                )
        return None

    def _note(self, name: str, updates: tuple[Update, ...]) -> None:
        if not updates:
            return
        traced, shape = self.base.tensors[name], tuple(tensor_of(self.base.model, name).shape)
        if tuple(traced.shape) != shape:
            self._note_other_shape(name, shape, updates)
            return
        for box in traced.boxes:
            stored = self.checkpoint.shape(box.source)
            if not self._can_add(box.source) and any(update.adds for update in updates):
                self.problems.append(
                    f"{name}: {box.source} is packed, or in whole numbers; name the checkpoint "
                    "that it was quantized from"
                )
                continue
            seen = self.updates.seen(name)
            try:
                for piece in pieces(box, shape, stored, seen):
                    parts = _parts(piece, updates, seen)
                    self.parts.setdefault(box.source, []).extend(parts)
            except NoRectangleError as error:
                self.problems.append(f"{name}: {error}")
            self.views[box.source] = as_rows(stored, shape, seen)

    def _note_other_shape(
        self, name: str, shape: tuple[int, ...], updates: tuple[Update, ...]
    ) -> None:
        """Note a tensor that an adapter has with another number of rows than the checkpoint."""
        source = self._whole(name)
        replaced = len(updates) == 1 and not updates[0].adds and self._share(updates) == 1.0
        if updates[0].rows is not None:  # all that the checkpoint lacks?
            lacking = range(self.base.tensors[name].shape[0], shape[0])
            replaced = replaced and {*lacking} <= {*updates[0].rows}
        if source is None or not replaced:
            there = tuple(self.base.tensors[name].shape)
            self.problems.append(f"{name} has shape {there} in the checkpoint, the adapter {shape}")
            return
        self.shapes[source] = shape
        view, seen = as_rows(shape), as_stack(shape)
        self.views[source] = view
        piece = Piece(0, (0, view[0]), (0, view[1]), 0, 0)
        self.parts.setdefault(source, []).extend(_parts(piece, updates, seen))

    def _add(self, name: str, stored: list[str], updates: tuple[Update, ...]) -> None:
        """Note a tensor that the checkpoint does not have under its own name."""
        source = self._whole(stored[0]) if stored else None
        if stored and source is None:
            self.problems.append(f"{name} is tied to {stored[0]}, which is stored in parts")
        elif not stored and (
            any(u.adds or u.rows is not None for u in updates) or self._share(updates) <= 0
        ):
            why = self.base.faults.get(name, "the checkpoint has no such tensor")
            self.problems.append(f"{name}: {why}")
        else:
            self.added[name] = (source, updates)

    def _whole(self, name: str) -> str | None:
        """Return the checkpoint's tensor that a tensor is, axis for axis, if it is one."""
        traced = self.base.tensors[name]
        if len(traced.boxes) != 1:
            return None
        (box,) = traced.boxes
        same = box.axes == tuple(range(traced.ndim)) and box.sizes == tuple(traced.shape)
        return box.source if same and self.checkpoint.shape(box.source) == box.sizes else None

    def _share(self, updates: tuple[Update, ...]) -> float:
        return sum(self.updates.adapters[update.adapter].weight for update in updates)

    def _check_names(self) -> None:
        """Check that transformers finds the new tensors under the names that they get."""
        found, _ = converted(self.base.model, list(self.added), lambda name: name)
        self.problems += [
            f"{name}: the checkpoint is in other names, and has none for it"
            for name in self.added
            if found.get(name) != name or name in self.checkpoint.where
        ]

    def _entries(self, shard: str) -> Iterator[Entry]:
        table = self.checkpoint.tables[shard]
        for name, stored in table.shapes.items():
            shape = self.shapes.get(name, stored)
            parts = tuple(self.parts.get(name, ()))
            view = self.views.get(name, as_rows(shape))
            yield Entry(name, self._type(table.dtypes[name]), shape, name, view, parts)
        last = shard == max(self.checkpoint.tables)
        for name, (source, updates) in self.added.items():
            if self.checkpoint.where[source] == shard if source is not None else last:
                yield self._new(name, source, updates)

    def _new(self, name: str, source: str | None, updates: tuple[Update, ...]) -> Entry:
        tensor = tensor_of(self.base.model, name)
        shape, seen = tuple(tensor.shape), self.updates.seen(name)
        if source is not None:
            dtype = self.checkpoint.dtype(source)
        else:
            dtype = _usual(self.base) if tensor.is_floating_point() else tensor.dtype
        boxes = Traced.of(name, shape).boxes
        found = (p for box in boxes for p in pieces(box, shape, shape, seen))
        parts = tuple(part for p in found for part in _parts(p, updates, seen)) if updates else ()
        return Entry(name, self._type(dtype), shape, source, as_rows(shape, shape, seen), parts)

    def _type(self, dtype: torch.dtype) -> torch.dtype:
        wide = dtype.is_floating_point and dtype.itemsize > 1
        return self.dtype if self.dtype is not None and wide else dtype


def _parts(piece: Piece, updates: tuple[Update, ...], seen: Stack) -> Iterator[Part]:
    """Yield what is done to a rectangle, or to those of its rows to which anything is."""
    if all(update.rows is None for update in updates):
        yield Part(piece, updates, seen)
        return
    for row, having in _by_row(updates).items():
        if piece.rows[0] <= row < piece.rows[1]:
            down, right = (0, row - piece.rows[0]) if piece.turned else (row - piece.rows[0], 0)
            one = dataclasses.replace(
                piece,
                rows=(row, row + 1),
                at_row=piece.at_row + down,
                at_column=piece.at_column + right,
            )
            yield Part(one, having, seen)


def _by_row(updates: tuple[Update, ...]) -> dict[int, tuple[Update, ...]]:
    found: dict[int, tuple[Update, ...]] = {}
    for update in updates:
        for row in update.rows or ():
            found[row] = (*found.get(row, ()), update)
    return dict(sorted(found.items()))


def _usual(base: CheckpointBase) -> torch.dtype:
    """Return the type of most of a checkpoint's floating-point tensors."""
    counts = Counter(
        dtype
        for table in base.checkpoint.tables.values()
        for dtype in table.dtypes.values()
        if dtype.is_floating_point and dtype.itemsize > 1
    )
    return counts.most_common(1)[0][0] if counts else torch.float32
