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
    """Return progress bars for stderr: gone when done, and nothing without a terminal."""
    console = Console(stderr=True, quiet=int(os.environ.get("RANK", "0")) > 0)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal or console.is_jupyter),
    )


def say(progress: Progress, text: str) -> None:
    """Print lines above the bars, as they stand: no markup, no line breaks of ours."""
    progress.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
