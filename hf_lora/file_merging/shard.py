"""Writing one file of a merged checkpoint: what is untouched by the kernel, the rest in rows."""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from hf_lora.file_merging.blend import Blend
from hf_lora.file_merging.checkpoint import Checkpoint, Table
from hf_lora.file_merging.measure import Sums, in_all
from hf_lora.file_merging.plan import Entry
from hf_lora.file_merging.updates import Updates
from hf_lora.file_merging.workers import Workers, memory
from hf_lora.files.copy_range import copy_range, read_all, write_all
from hf_lora.files.safetensors_io import TensorFile, lay_out

NUMBERS = 1 << 18
"""How many numbers are computed at once: a megabyte in float32, which caches hold."""

_MEASURED_GROUPS, _MEASURED_ROWS = 4, 8
"""Of one in so many groups of rows, one in so many rows is measured."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a file begins with, and where its tensors go."""

    beginning: bytes
    places: tuple[int, ...]
    """Where each tensor begins, and where the last one ends."""

    @classmethod
    def of(cls, entries: tuple[Entry, ...], source: TensorFile) -> "Layout":
        """Return that of a merged file, which begins as its source does if nothing is other."""
        metadata = {"format": "pt"} | source.metadata
        beginning, places = lay_out(((e.name, e.dtype, e.shape) for e in entries), metadata)
        same = [e.name for e in entries] == list(Table.of(source).shapes) and all(
            (e.dtype, e.shape) == (source.dtypes[e.name], source.shapes[e.name]) for e in entries
        )
        if same:
            beginning = source.beginning()
            places = [source.span(e.name)[0] for e in entries]
            places.append(source.span(entries[-1].name)[1] if entries else len(beginning))
        return cls(beginning, tuple(places))


def write_shard(
    path: Path, entries: tuple[Entry, ...], source: TensorFile, updates: Updates, workers: Workers
) -> dict[str, Sums]:
    """Write a merged file.

    Args:
        path: A file that is not there yet.
        entries: Its tensors, in order.
        source: The file of the base that holds what they begin as.
        updates: What the adapters do.
        workers: Who computes.

    Returns:
        What was measured of each tensor that was changed.
    """
    layout, checkpoint = Layout.of(entries, source), updates.base.checkpoint
    found = {}
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with source.open() as file, open(os.open(path, flags, 0o666), "wb", buffering=0) as out:
        write_all(out.fileno(), memoryview(layout.beginning), 0)
        os.truncate(out.fileno(), layout.places[-1])
        kept: list[tuple[int, int, int]] = []
        for entry, at in zip(entries, layout.places, strict=False):
            if is_copied(entry, checkpoint):
                start, end = source.span(entry.name)
                kept.append((start, at, end - start))
                continue
            rows = MergedRows(entry, file.fileno(), source, updates)
            sums = workers.each(
                lambda first, rows=rows, at=at: rows.write(first, out.fileno(), at), rows.groups
            )
            if entry.parts:
                found[entry.name] = in_all(sums)
        for start, at, count in _joined(kept):
            copy_range(file.fileno(), start, out.fileno(), at, count)
    return found


def is_copied(entry: Entry, checkpoint: Checkpoint) -> bool:
    """Say whether a tensor's bytes are those that the base has."""
    return (
        not entry.parts
        and entry.source == entry.name
        and entry.name not in checkpoint.packed
        and entry.dtype == checkpoint.dtype(entry.name)
    )


class MergedRows:
    """One tensor of a merged checkpoint, in groups of rows that are independent of each other."""

    def __init__(self, entry: Entry, handle: int, source: TensorFile, updates: Updates):
        """Prepare for it.

        Args:
            entry: The tensor.
            handle: The source, open.
            source: The file that it begins as.
            updates: What the adapters do.
        """
        self._entry = entry
        self._handle = handle
        self._file = source
        self._checkpoint = checkpoint = updates.base.checkpoint
        rows, columns = entry.view
        step = max(1, NUMBERS // max(columns, 1))
        self.groups = range(0, rows, step)
        self._held = entry.dtype if entry.source is None else checkpoint.dtype(entry.source)
        self._wide = wide_type(self._held, entry.dtype)
        self._blend = Blend(entry, updates, self._wide)
        shape = (0,) if entry.source is None else checkpoint.shape(entry.source)
        self._there = math.prod(shape) // max(columns, 1)

    def write(self, first: int, handle: int, at: int) -> Sums:
        """Compute a group and write it.

        Args:
            first: The first row of it.
            handle: A file that is open for writing.
            at: Where in it the tensor begins.

        Returns:
            What was measured of it, which may be nothing.
        """
        columns = self._entry.view[1]
        base, merged = self._merged(first)
        sums = self._measured(first, base, merged)
        rounded = memory("rounded", merged.numel(), self._entry.dtype).copy_(merged.view(-1))
        write_all(handle, as_bytes(rounded), at + first * columns * rounded.itemsize)
        return sums

    def measure(self, first: int) -> Sums:
        """Compute a group, and only measure it."""
        return self._measured(first, *self._merged(first))

    def _merged(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows of the base, and of the sum in the wide type, until the next are computed."""
        rows, columns = self._entry.view
        count = min(self.groups.step, rows - first)
        base = memory("base", count * columns, self._held).view(count, columns)
        got = max(0, min(count, self._there - first))
        if got:
            self._read(first * columns, base[:got].view(-1))
        if got < count:
            base[got:].zero_()
        merged = memory("wide", count * columns, self._wide).view(count, columns)
        merged.copy_(base)
        self._blend.put_in(merged, first)
        return base, merged

    def _read(self, begin: int, target: torch.Tensor) -> None:
        """Fill memory with the base's numbers from one place on."""
        name = self._entry.source
        assert name is not None
        if name in self._checkpoint.packed:
            end = begin + len(target)
            target.copy_(self._checkpoint.numbers(self._file, name, begin, end))
        else:
            start = self._file.span(name)[0] + begin * target.itemsize
            read_all(self._handle, as_bytes(target), start)

    def _measured(self, first: int, base: torch.Tensor, merged: torch.Tensor) -> Sums:
        sums = Sums()
        one = first // self.groups.step % _MEASURED_GROUPS == 0
        if one and self._entry.parts and self._wide.is_floating_point:
            step = _MEASURED_ROWS if len(base) > _MEASURED_ROWS else 1
            rows = base[::step].contiguous(), merged[::step].contiguous()
            sums.add(*rows, four_bits=first == 0)
        return sums


def wide_type(held: torch.dtype, given: torch.dtype) -> torch.dtype:
    """Return the type to add up in: float32 for 16 bits, float64 for what has as many as float32.

    Whole numbers stay what they are.
    """
    if not given.is_floating_point:
        return given
    return torch.float32 if given.itemsize < 4 and held.itemsize <= 4 else torch.float64


def as_bytes(numbers: torch.Tensor) -> memoryview:
    """Return a tensor's own memory."""
    flat = numbers.detach().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _joined(ranges: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield ranges to copy, those that follow each other in both files as one."""
    start = at = count = 0
    for next_start, next_at, more in ranges:
        if (next_start, next_at) != (start + count, at + count):
            if count:
                yield start, at, count
            start, at, count = next_start, next_at, 0
        count += more
    if count:
        yield start, at, count
