"""What a training logged, kept beside the adapter: as JSON, and as a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lora.files.atomic import as_json

HISTORY_FILE = "history.json"
PICTURE = "loss.png"

History = Sequence[Mapping[str, Any]]
"""Trainer's ``state.log_history``."""


def write_history(folder: Path, history: History) -> None:
    """Write the history into a folder, and the picture of its losses if matplotlib is installed."""
    (folder / HISTORY_FILE).write_bytes(as_json({"history": list(history)}))
    try:
        draw(history, folder / PICTURE)
    except ImportError:
        (folder / PICTURE).unlink(missing_ok=True)  # of another training


def read_history(folder: Path) -> History:
    """Return what :func:`write_history` wrote; nothing if it wrote nothing."""
    path = folder / HISTORY_FILE
    return json.loads(path.read_text(encoding="utf-8"))["history"] if path.is_file() else []


def draw(history: History, path: Path) -> None:
    """Draw the losses, in training and on what was held out, by step.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, mark in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        rows = [row for row in history if name in row]
        if rows:
            steps, losses = [row["step"] for row in rows], [row[name] for row in rows]
            axes.plot(steps, losses, mark, label=label)
    axes.set(xlabel="step", ylabel="loss")
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
