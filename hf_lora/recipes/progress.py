"""Bars on stderr for what takes long, and lines above them."""

import os

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from hf_lora.text import printable


def bars() -> Progress:
    """Return progress bars for stderr: gone when done, and nothing without a terminal.

    Nor in a notebook: there rich needs ipywidgets, and without them takes each line that is printed
    meanwhile through itself, until the stack is full.
    """
    quiet = int(os.environ.get("RANK", "0")) > 0
    console = Console(stderr=True, quiet=quiet, force_jupyter=False)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def say(progress: Progress, text: str) -> None:
    """Print lines above the bars, as they stand: no markup, no line breaks of ours."""
    progress.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
