"""Writing one file of a merged checkpoint: what is untouched by the kernel, the rest in rows."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from hf_lora.file_merging.blend import Blend
from hf_lora.file_merging.measure import Sums
from hf_lora.file_merging.plan import Entry
from hf_lora.file_merging.updates import Updates
from hf_lora.files.copy_range import copy_range, read_all, write_all
from hf_lora.files.safetensors_io import TensorFile, lay_out

NUMBERS = 1 << 19
"""How many numbers are in memory at once: two megabytes in float32, which caches hold."""

_MEASURED = 8
"""One in so many groups of rows is measured."""


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
        same = len(entries) == len(source.shapes) and all(
            (e.name == e.source, e.dtype, e.shape) == (True, source.dtypes[e.name], e.shape)
            and e.shape == source.shapes[e.name]
            for e in entries
            if e.name in source.shapes
        )
        if same and all(e.name in source.shapes for e in entries):
            beginning = source.beginning()
            places = [source.span(e.name)[0] for e in entries]
            places.append(source.span(entries[-1].name)[1] if entries else len(beginning))
        return cls(beginning, tuple(places))


def write_shard(
    path: Path, entries: tuple[Entry, ...], source: TensorFile, updates: Updates
) -> dict[str, Sums]:
    """Write a merged file and flush it to the disk.

    Args:
        path: A file that is not there yet.
        entries: Its tensors, in order.
        source: The file of the base that holds what they begin as.
        updates: What the adapters do.

    Returns:
        What was measured of each tensor that was changed.
    """
    layout = Layout.of(entries, source)
    found = {}
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with source.open() as file, open(os.open(path, flags, 0o666), "wb", buffering=0) as out:
        write_all(out.fileno(), memoryview(layout.beginning), 0)
        kept: list[tuple[int, int, int]] = []
        for entry, at in zip(entries, layout.places, strict=False):
            if is_copied(entry, source):
                start, end = source.span(entry.name)
                kept.append((start, at, end - start))
                continue
            sums = Sums()
            for rows, where in merged_rows(entry, file.fileno(), source, updates, sums):
                write_all(out.fileno(), as_bytes(rows), at + where)
            if entry.parts:
                found[entry.name] = sums
        for start, at, count in _joined(kept):
            copy_range(file.fileno(), start, out.fileno(), at, count)
        os.truncate(out.fileno(), layout.places[-1])
        os.fsync(out.fileno())
    return found


def is_copied(entry: Entry, source: TensorFile) -> bool:
    """Say whether a tensor's bytes are those that the base has."""
    return (
        not entry.parts and entry.source == entry.name and entry.dtype == source.dtypes[entry.name]
    )


def merged_rows(
    entry: Entry,
    handle: int,
    source: TensorFile,
    updates: Updates,
    sums: Sums,
    *,
    every: int = 1,
) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield groups of merged rows, in the type that they get, and where in the tensor each begins.

    Args:
        entry: The tensor.
        handle: The source, open.
        source: The file that it begins as.
        updates: What the adapters do.
        sums: What is measured is added there.
        every: Take one in so many groups.
    """
    rows, columns = entry.view
    held = entry.dtype if entry.source is None else source.dtypes[entry.source]
    wide = wide_type(held, entry.dtype)
    blend = Blend(entry, updates, wide)
    step = max(1, NUMBERS // max(columns, 1))
    there = 0 if entry.source is None else _numbers(source, entry.source) // max(columns, 1)
    memory = torch.empty(step * columns, dtype=held)
    total = torch.empty(step * columns, dtype=wide)
    start = 0 if entry.source is None else source.span(entry.source)[0]
    for i, first in enumerate(range(0, rows, step)):
        if i % every:
            continue
        count = min(step, rows - first)
        base = memory[: count * columns].view(count, columns)
        got = max(0, min(count, there - first))
        if got:
            read_all(handle, as_bytes(base[:got]), start + first * columns * held.itemsize)
        base[got:].zero_()
        merged = total[: count * columns].view(count, columns)
        merged.copy_(base)
        blend.put_in(merged, first)
        if entry.parts and i % _MEASURED == 0 and wide.is_floating_point:
            sums.add(base, merged)
        yield merged.to(entry.dtype), first * columns * entry.dtype.itemsize


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


def _numbers(source: TensorFile, name: str) -> int:
    return torch.Size(source.shapes[name]).numel()


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
