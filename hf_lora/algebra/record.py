"""An adapter that was computed and not trained: its tensors, and how exact they are."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lora.files.data import AdapterData
from hf_lora.files.write import write_folder
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.text import printable

_WORST = 5


@dataclasses.dataclass(frozen=True)
class RelativeError:
    """How far an adapter's updates are from what they stand for, in the Frobenius norm.

    What is lost by a lower rank and by rounding to the type of the tensors, over the norm of the
    exact update.
    """

    total: float
    """Of all layers together."""

    layers: Mapping[str, float]
    """Path of each layer to its own."""

    def __float__(self) -> float:
        """Return the total."""
        return self.total


@dataclasses.dataclass(frozen=True)
class DerivedAdapter:
    """An adapter that was made of others or of two models; ``print`` shows it.

    :meth:`save` writes it; :func:`hf_lora.load` and PEFT take the folder.
    """

    title: str
    """What was done, for people."""

    data: AdapterData
    """All that is written."""

    error: RelativeError
    """Of what is written, against what was asked for without a lower rank and without rounding.
    Of ``ties`` and ``dare`` that is what these make of the adapters, not the sum of them."""

    norms: Mapping[str, float]
    """Path of each layer to the Frobenius norm of its exact update."""

    told: tuple[str, ...] = ()
    """What was decided on the way, a line each."""

    @property
    def layers(self) -> Mapping[str, LayerConfig]:
        """Path of each layer to its rank and strength."""
        return self.data.slots

    @property
    def energy(self) -> dict[str, float]:
        """Path of each layer to the share of the squared norm that it keeps."""
        return {path: 1.0 - min(error, 1.0) ** 2 for path, error in self.error.layers.items()}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write an adapter folder, replacing an older one as :func:`hf_lora.save` does.

        Raises:
            SaveError: The folder holds a full model, or cannot be written.
        """
        write_folder(Path(directory), self.data)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known of it as plain data, without the tensors."""
        return {
            "title": self.title,
            "base": self.data.base,
            "error": self.error.total,
            "layers": {
                path: {
                    "r": slot.r,
                    "alpha": slot.alpha,
                    "norm": _finite(self.norms.get(path, 0.0)),
                    "error": _finite(self.error.layers.get(path, 0.0)),
                }
                for path, slot in self.layers.items()
            },
            "trained": list(self.data.trained),
            "told": list(self.told),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the same as JSON, and write it to a file if one is named."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text)
        return text

    def __str__(self) -> str:
        ranks = sorted({slot.r for slot in self.layers.values()})
        shown = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 2 else " and ".join(map(str, ranks))
        numbers = sum(tensor.numel() for tensor in self.data.tensors.values())
        lines = [
            self.title,
            f"  base: {self.data.base or 'not named'}",
            f"  {len(self.layers)} layers of rank {shown or 'none'}; {numbers:,} numbers",
            f"  relative error {self.error.total:.3g}",
        ]
        if self.data.trained:
            lines.append(f"  in full: {', '.join(self.data.trained)}")
        worst = sorted(self.error.layers.items(), key=lambda item: -item[1])[:_WORST]
        if worst and worst[0][1] > 0:
            lines.append("  furthest from what they stand for (error, rank, layer)")
            lines += [f"    {error:8.3g}  {self.layers[p].r:4}  {p}" for p, error in worst if error]
        lines += [f"  note: {line}" for line in self.told]
        return printable("\n".join(lines), longest=None)


def relative(residuals: Mapping[str, float], norms: Mapping[str, float]) -> RelativeError:
    """Return the error from the norms of what is lost and of what should be there.

    Where there should be nothing, what is there is as wrong as it is large.
    """
    layers = {path: _ratio(lost, norms[path]) for path, lost in residuals.items()}
    total = _ratio(math.hypot(*residuals.values()), math.hypot(*norms.values()))
    return RelativeError(total, layers)


def _ratio(lost: float, norm: float) -> float:
    return lost / norm if norm else (math.inf if lost else 0.0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
