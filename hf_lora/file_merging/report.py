"""What a merge has done: how large each change is, and how much of it the output can hold."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lora.file_merging.measure import NF4
from hf_lora.planning.records import size
from hf_lora.text import printable

TOO_MUCH = 0.05
"""How much of a change may be rounded away without a warning."""

_WORST = 5
_WORDS = {"added": "low-rank", "replaced": "trained in full", "both": "both"}


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """One tensor of the output that differs from the base's."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    change: str
    """``added`` for low-rank updates, ``replaced`` for what was trained in full, or ``both``."""

    measured: int
    """Of how many of its numbers what follows was measured."""

    ratio: float
    """Standard deviation of the change over that of the base's weight."""

    lost: Mapping[str, float]
    """Name of a grid (``bfloat16``, ``float16``, ``float32``, ``nf4``) to the share of the change
    that it would round away: a relative error in the Frobenius norm."""

    @property
    def rounded_away(self) -> float:
        """The same for the type that the tensor has."""
        return self.lost.get(self.dtype, 0.0)


@dataclasses.dataclass(frozen=True)
class Verified:
    """A sample of the output, read again and compared with float64."""

    numbers: int
    equal: int
    """How many are what float64 gives, rounded once."""

    worst: int
    """How many places of the output's type the furthest is away, one at the most."""

    def joined(self, other: "Verified") -> "Verified":
        """Return this and another one together."""
        return Verified(
            self.numbers + other.numbers,
            self.equal + other.equal,
            max(self.worst, other.worst),
        )


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What :func:`hf_lora.merge_checkpoint` did; ``print`` shows it.

    Shares and ratios are relative errors and ratios of norms, measured on a thirtieth of the rows
    of each tensor while it was merged.
    """

    directory: str | None
    """The merged checkpoint; None if nothing was written."""

    base: str
    commit: str | None
    """Of the base, if it is from the Hub."""

    weights: str
    """Into which weights was merged: ``original`` or ``dequantized``."""

    adapters: Mapping[str, float]
    """Each adapter to the factor that it was merged with."""

    dtype: str
    """Type of most of the output's numbers."""

    tensors: tuple[MergedTensor, ...]
    copied: int
    """Bytes that the base has just so."""

    written: int
    """Bytes that were computed."""

    added: tuple[str, ...]
    """Names of tensors that the base's checkpoint does not have."""

    untied: tuple[str, ...]
    """Names of tensors that were one with another in the base, and are not in the output."""

    told: tuple[str, ...]
    lost: Mapping[str, float]
    """As of a tensor, for all of the change."""

    ratio: float
    verified: Verified | None = None

    @property
    def rounded_away(self) -> float:
        """Which share of all that the adapters change the output's type has rounded away."""
        return self.lost.get(self.dtype, 0.0)

    @property
    def worst(self) -> list[MergedTensor]:
        """The tensors of which most was rounded away, first."""
        ranked = sorted(self.tensors, key=lambda each: -each.rounded_away)
        return [each for each in ranked[:_WORST] if each.rounded_away]

    @property
    def warning(self) -> str | None:
        """What to say where too much was rounded away: how much, and which type keeps it."""
        if self.rounded_away <= TOO_MUCH:
            return None
        better = [
            f"{name} {_share(lost)}"
            for name, lost in self.lost.items()
            if name not in (NF4, self.dtype) and lost < self.rounded_away
        ]
        other = f" With dtype=... these would lose: {', '.join(better)}." if better else ""
        return (
            f"{self.dtype} has rounded away {_share(self.rounded_away)} of what the adapters "
            f"change, because the change is {self.ratio:.2g} times as large as the weights are."
            f"{other} Served beside the base, an adapter loses nothing."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, of which :meth:`to_json` is the text."""
        return _finite(dataclasses.asdict(self)) | {"rounded_away": self.rounded_away}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return it as JSON, and write it to a file if one is named."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text)
        return text

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw each tensor's ratio and loss, in the order of the checkpoint, into a picture.

        Needs matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        shown = [each for each in self.tensors if each.measured]
        places = range(len(shown))
        above.scatter(places, [each.ratio for each in shown], s=8)
        above.set_yscale("log")
        above.set_ylabel("change / weight")
        for grid in self.lost:
            mark = 10 if grid == self.dtype else 4
            below.scatter(places, [each.lost.get(grid, 0) for each in shown], s=mark, label=grid)
        below.axhline(TOO_MUCH, color="grey", linewidth=0.8)
        below.set_yscale("log")
        below.set_ylabel("rounded away")
        below.set_xlabel("tensor")
        below.legend(loc="best", fontsize=8)
        figure.savefig(path, dpi=120)

    def __str__(self) -> str:
        lines = [
            f"merged into {self.directory}" if self.directory else "nothing was written",
            f"  base: {self.base}" + (f" at {self.commit}" if self.commit else ""),
            *(f"  adapter: {name} x {weight:g}" for name, weight in self.adapters.items()),
            f"  {len(self.tensors)} tensors changed ({size(self.written)} computed), "
            f"{size(self.copied)} copied, {self.dtype}, into the {self.weights} weights",
            f"  the change is {self.ratio:.2g} times as large as the weights",
            f"  rounded away: {', '.join(self._losses())}",
        ]
        if self.added:
            lines.append(f"  new tensors: {', '.join(self.added)}")
        if self.untied:
            lines.append(f"  not tied any more: {', '.join(self.untied)}")
        if self.worst:
            lines += ["  most was rounded away of", *map(_row, self.worst)]
        if self.verified is not None:
            done = self.verified
            share = done.equal / max(done.numbers, 1)
            lines.append(
                f"  verified: {share:.4%} of {done.numbers} numbers are float64's, rounded once; "
                f"the furthest is {done.worst} places away"
            )
        lines += [f"  note: {line}" for line in self.told]
        return printable("\n".join(lines), longest=None)

    def _losses(self) -> list[str]:
        return [
            f"{_share(lost)} by {name}" + (" (this output)" if name == self.dtype else "")
            for name, lost in self.lost.items()
        ]


def _row(tensor: MergedTensor) -> str:
    words = _WORDS[tensor.change]
    return f"    {_share(tensor.rounded_away):>8}  {tensor.ratio:8.2g}  {tensor.name} ({words})"


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 or not value else f"{value:.1g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
