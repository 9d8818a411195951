"""A base model's fingerprint: enough of every tensor to tell the model from any other.

Kept in the adapter's header and compared on load. A sample, not a hash: the base may be loaded in
another type, or quantized, or with more tokens, and still be the same base. In JSON:

- ``tensors``: name of each tensor to its shape and up to 16 of its numbers (little-endian float32
  in base64, null where they could not be read), and ``true`` behind them if they were quantized.
- ``ties``: name of a tensor to the name under which ``tensors`` has the same one.
- ``vocabulary``: how many tokens the input embeddings have, or null.
- ``quantized``: whether any of it is.
"""

import base64
import binascii
import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

_VALUES = 16
_MOST_DIMS = 8
_LARGEST_DIM = 2**40
_SAME = 0.005
"""Relative difference up to which tensors are the same: bfloat16 rounds by up to 0.004."""

_SAME_QUANTIZED = 0.5
"""The same where either side is quantized. Of weights that have nothing to do with each other it is
about 1.4; 4-bit NF4 rounds by about 0.1, and by 0.3 where a few large numbers stand in a block."""

_FLOAT16_STEP = 6e-8
"""What float16 rounds to at the least: it counts where all numbers of a tensor are tiny."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a fingerprint has of one tensor."""

    shape: tuple[int, ...]
    values: torch.Tensor | None
    """The numbers at :func:`positions`, float32; None if they could not be read."""

    quantized: bool = False

    def first(self, count: int) -> torch.Tensor | None:
        """Return the numbers that stand among the first ``count`` of the flattened tensor."""
        at = positions(self.shape)
        inside = len(range(at.start, min(at.stop, count), at.step))
        return None if self.values is None else self.values[:inside]


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """A fingerprint that was read and checked."""

    samples: dict[str, Sample]
    ties: dict[str, str]
    vocabulary: int | None
    damaged: tuple[str, ...]
    """Names of tensors whose entry makes no sense."""


def positions(shape: tuple[int, ...]) -> range:
    """Return which numbers of a flattened tensor of this shape are sampled.

    Steps of equal size, over all of it. In a matrix they would meet the same few columns again and
    again; so a step ends up further along its row by the golden section, and they spread over
    all columns.
    """
    count = math.prod(shape)
    step = max(count // _VALUES, 1)
    width = shape[-1] if shape else 1
    if count and step >= 2 * width:
        step -= (step - (round(0.618 * width) | 1)) % width
    return range(0, min(count, _VALUES * step), step)


def without_rows(
    values: torch.Tensor, shape: tuple[int, ...], rows: Collection[int]
) -> torch.Tensor:
    """Return sampled numbers with zero for those that are in some rows of the tensor.

    Args:
        values: The first of the numbers at :func:`positions`.
        shape: The tensor's.
        rows: Numbers of rows, which an adapter has of its own.
    """
    width, there = max(math.prod(shape[1:]), 1), set(rows)
    at = positions(shape)[: len(values)]
    keep = torch.tensor([position // width not in there for position in at], dtype=torch.bool)
    return torch.where(keep, values, torch.zeros_like(values))


def to_json(
    samples: Mapping[str, Sample], ties: Mapping[str, str], vocabulary: int | None
) -> dict[str, Any]:
    """Return a fingerprint as the header holds it."""
    return {
        "quantized": any(sample.quantized for sample in samples.values()),
        "tensors": {name: _entry(sample) for name, sample in samples.items()},
        "ties": dict(ties),
        "vocabulary": vocabulary,
    }


def from_json(content: Mapping[str, Any]) -> Fingerprint | None:
    """Return what a header holds, or None if it has no fingerprint of this kind.

    A stranger may have written it; what makes no sense is named.
    """
    tensors, ties, vocabulary = (content.get(key) for key in ("tensors", "ties", "vocabulary"))
    if not isinstance(tensors, dict):
        return None
    samples = {name: _sample(entry) for name, entry in tensors.items()}
    ties = ties if isinstance(ties, dict) else {}
    sound = type(vocabulary) is int and 0 <= vocabulary <= _LARGEST_DIM
    return Fingerprint(
        samples={name: sample for name, sample in samples.items() if sample is not None},
        ties={name: to for name, to in ties.items() if isinstance(to, str)},
        vocabulary=vocabulary if sound else None,
        damaged=tuple(name for name, sample in samples.items() if sample is None),
    )


def difference(then: torch.Tensor, now: torch.Tensor, quantized: bool) -> str | None:
    """Return by how much numbers are not those that were recorded, or None if they are the same.

    Args:
        then: What was recorded, float32.
        now: The numbers at the same positions, now.
        quantized: Whether either of the two is quantized.
    """
    if torch.equal(then, now):  # as nearly always; what follows takes ten times as long
        return None
    limit = _SAME_QUANTIZED if quantized else _SAME
    finite = torch.isfinite(then)
    if not torch.equal(then[~finite].nan_to_num(), now[~finite].nan_to_num()):
        return "numbers that are not finite stand elsewhere"
    then, now = then[finite].double(), now[finite].double()
    off = float((then - now).norm())
    if off <= limit * float(then.norm()) + _FLOAT16_STEP * math.sqrt(len(then)):
        return None
    share = off / max(float(then.norm()), 1e-12)
    return f"the numbers differ by {share:.1%} (allowed: {limit:.1%})"


def _entry(sample: Sample) -> list[Any]:
    text = None
    if sample.values is not None:
        text = base64.b64encode(sample.values.numpy().astype("<f4").tobytes()).decode()
    return [list(sample.shape), text, *([True] if sample.quantized else [])]


def _sample(entry: Any) -> Sample | None:
    if not isinstance(entry, list) or len(entry) not in (2, 3):
        return None
    shape, text, quantized = entry[0], entry[1], entry[2:] == [True]
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMS
        or (len(entry) == 3 and not quantized)
    ):
        return None
    if not all(type(size) is int and 0 <= size <= _LARGEST_DIM for size in shape):
        return None
    if text is None:
        return Sample(tuple(shape), None, quantized)
    count = len(positions(tuple(shape))) if math.prod(shape) < 2**62 else -1
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        return None
    if len(data) != 4 * count:
        return None
    values = torch.frombuffer(bytearray(data), dtype=torch.float32) if data else torch.empty(0)
    return Sample(tuple(shape), values, quantized)
