"""Reading a merged file again and comparing a sample of it with float64."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from hf_lora.errors import SaveError, listing
from hf_lora.file_merging.blend import Blend
from hf_lora.file_merging.checkpoint import Checkpoint
from hf_lora.file_merging.plan import Entry
from hf_lora.file_merging.report import Verified
from hf_lora.file_merging.shard import is_copied
from hf_lora.file_merging.updates import Updates
from hf_lora.files.safetensors_io import TensorFile

_NUMBERS = 1 << 14
"""How many numbers stand together in the sample of a tensor."""

_GROUPS = 4
"""In how many places of it they are."""


_OTHER = 99
"""How many places what was to be copied is said to be away if its bytes are others."""


def verify_shard(
    path: Path, entries: tuple[Entry, ...], source: TensorFile, updates: Updates
) -> Verified:
    """Compare a sample of every tensor of a merged file with what float64 gives, rounded once.

    Args:
        path: The merged file.
        entries: Its tensors.
        source: The file of the base that they begin as.
        updates: What the adapters do.

    Raises:
        SaveError: A number is further away than one place of its type; each tensor is named.
    """
    file = TensorFile(path)
    found, problems = Verified(0, 0, 0), []
    for entry in entries:
        one = _verify(file, entry, source, updates)
        found = found.joined(one)
        if one.worst > 1:
            problems.append(f"{entry.name}: up to {one.worst} places of {entry.dtype} away")
    if problems:
        raise SaveError(listing(f"{path.name} is not what float64 gives", problems))
    return found


def _verify(file: TensorFile, entry: Entry, source: TensorFile, updates: Updates) -> Verified:
    checkpoint = updates.base.checkpoint
    copied = is_copied(entry, checkpoint)
    blend = None if copied else Blend(entry, updates, torch.float64)
    found = Verified(0, 0, 0)
    for first, count in _sample(*entry.view):
        columns = entry.view[1]
        got = file.part(entry.name, first * columns, (first + count) * columns)
        base = _base_rows(entry, source, checkpoint, first, count)
        if blend is None or not entry.dtype.is_floating_point:
            same = got.numel() if _same_bytes(got, base if blend is None else got) else 0
            found = found.joined(Verified(got.numel(), same, 0 if same else _OTHER))
            continue
        exact = base.double().view(count, columns)
        blend.put_in(exact, first)
        found = found.joined(_compared(got, exact.flatten(), base.double()))
    return found


def _compared(got: torch.Tensor, exact: torch.Tensor, base: torch.Tensor) -> Verified:
    """Compare numbers with the exact ones, in places of the larger of a number and its base.

    Where a change takes away nearly all of a weight, the rest has more places than the sum had.
    """
    rounded = exact.to(got.dtype)
    off = (got.double() - rounded.double()).abs()
    largest = torch.maximum(base.abs(), rounded.double().abs())
    last = torch.full_like(largest, torch.finfo(got.dtype).eps)
    places = torch.ldexp(last, largest.frexp().exponent - 1)
    places = places.clamp_min(torch.finfo(got.dtype).tiny * torch.finfo(got.dtype).eps)
    unequal = off > 0
    worst = int((off / places).ceil().max()) if bool(unequal.any()) else 0
    return Verified(got.numel(), got.numel() - int(unequal.sum()), worst)


def _sample(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield groups of rows, spread over a tensor: first, and how many."""
    count = max(1, _NUMBERS // max(columns, 1))
    if rows <= count * _GROUPS:
        yield 0, rows
        return
    for i in range(_GROUPS):
        yield i * (rows - count) // (_GROUPS - 1), count


def _base_rows(
    entry: Entry, source: TensorFile, checkpoint: Checkpoint, first: int, count: int
) -> torch.Tensor:
    """Return what the base has of some rows; zeros of those that it does not have."""
    columns = entry.view[1]
    if entry.source is None:
        return torch.zeros(count * columns, dtype=entry.dtype)
    whole = math.prod(checkpoint.shape(entry.source))
    begin, end = min(first * columns, whole), min((first + count) * columns, whole)
    rows = torch.zeros(count * columns, dtype=checkpoint.dtype(entry.source))
    rows[: end - begin] = checkpoint.numbers(source, entry.source, begin, end)
    return rows


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
