"""How large an update is beside the weight, and how much of it each grid of numbers rounds away.

A weight that is stored in 16 bits cannot take up a change that is much smaller than its last place:
of an update with a standard deviation of 1e-4, on weights of 0.02, bfloat16 keeps two thirds.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NF4 = "nf4"
_BLOCK = 64
"""How many numbers of a 4-bit tensor share a scale."""

_MOST_IN_4_BITS = 1 << 16
"""Of how many numbers of a tensor it is measured what 4 bits would keep."""

# The quantiles of a normal distribution that QLoRA (arXiv 2305.14314) names NF4.
_QUANTILES = torch.tensor(
    [
        *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ]
)


@dataclasses.dataclass
class Sums:
    """Sums of squares over the numbers of one tensor that were measured."""

    numbers: int = 0
    base: float = 0.0
    change: float = 0.0
    lost: dict[str, float] = dataclasses.field(default_factory=dict)
    """Name of a grid to what it rounds away of the sum."""

    changed: dict[str, float] = dataclasses.field(default_factory=dict)
    """The change of the numbers of which that was measured."""

    def add(self, base: torch.Tensor, total: torch.Tensor, *, four_bits: bool) -> None:
        """Measure some rows.

        Args:
            base: What they were.
            total: What they are, in a wide type, before they are rounded.
            four_bits: Whether to measure what 4 bits would keep, too, which takes longer.
        """
        change = total - base
        found = _square(change)
        self.numbers += change.numel()
        self.base += _square(base.to(change.dtype))
        self.change += found
        for name, dtype in DTYPES.items():
            self._note(name, _square(total - total.to(dtype).to(total.dtype)), found)
        if four_bits:
            some = total.reshape(-1)[:_MOST_IN_4_BITS]
            if len(some) >= _BLOCK:
                some = some[: len(some) // _BLOCK * _BLOCK]
                own = _square(change.reshape(-1)[: len(some)])
                self._note(NF4, _square(some - in_4_bits(some)), own)

    def join(self, other: "Sums") -> None:
        """Add what was measured of another tensor."""
        self.numbers += other.numbers
        self.base += other.base
        self.change += other.change
        for name, lost in other.lost.items():
            self._note(name, lost, other.changed[name])

    def ratio(self) -> float:
        """Return the standard deviation of the change over that of the base."""
        return _root(self.change, self.base)

    def rounded_away(self) -> dict[str, float]:
        """Return for each grid the relative error of the change that it stores."""
        return {name: _root(lost, self.changed[name]) for name, lost in self.lost.items()}

    def as_data(self) -> dict[str, Any]:
        """Return the same as plain data, of which :meth:`of` makes it again."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Sums":
        """Return what :meth:`as_data` has written."""
        return cls(**data)

    def _note(self, grid: str, lost: float, changed: float) -> None:
        self.lost[grid] = self.lost.get(grid, 0.0) + lost
        self.changed[grid] = self.changed.get(grid, 0.0) + changed


def in_all(measured: Iterable[Sums]) -> Sums:
    """Return what was measured of several parts together."""
    total = Sums()
    for each in measured:
        total.join(each)
    return total


def in_4_bits(numbers: torch.Tensor) -> torch.Tensor:
    """Return what numbers become in NF4, in blocks of 64 that share the largest as their scale."""
    blocks = numbers.view(-1, _BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(numbers.dtype).tiny)
    table = _QUANTILES.to(numbers.dtype)
    between = (table[1:] + table[:-1]) / 2
    return (table[torch.bucketize(blocks / scale, between)] * scale).view(numbers.shape)


def _square(numbers: torch.Tensor) -> float:
    flat = numbers.reshape(-1)
    return float(torch.dot(flat, flat))


def _root(one: float, other: float) -> float:
    if not one:
        return 0.0
    return math.sqrt(one / other) if other else math.inf


def dtype_name(dtype: torch.dtype) -> str:
    """Return a type's own name: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
