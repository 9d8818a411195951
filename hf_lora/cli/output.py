"""What a command prints and how it ends: results on stdout, everything else on stderr, exit codes.

Exit code 0: done. 1: the library refused, or a file is missing; the reason is on stderr. 2: wrong
usage (typer's own). 130: Ctrl-C. With ``--json`` stdout is exactly one JSON document, also after a
refusal.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import typer
from rich.console import Console

from hf_lora.errors import HfLoRAError, HfLoRAWarning
from hf_lora.text import printable, wrapped

_NARROWEST = 40
_INTERRUPTED = 130  # as shells have it


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command found or did."""

    data: dict[str, Any]
    """For ``--json``: plain data."""

    text: str
    """For people."""

    as_it_is: bool = False
    """Whether it is somebody's words, so that a terminal alone breaks its lines."""

    refused: bool = False
    """Whether what was found is a reason for exit code 1, such as a plan with problems."""


def execute(command: Callable[[], Result], *, as_json: bool) -> None:
    """Run a command, print its result and end the process with the exit code that it deserves."""
    with _only_for_the_result(as_json) as stdout, _plain_warnings():
        try:
            result = command()
        except (HfLoRAError, OSError) as error:
            tell(f"error: {error}", style="bold red")
            if as_json:
                _write(stdout, {"error": {"type": type(error).__name__, "message": str(error)}})
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stopped:
            tell(str(stopped) or "stopped")
            if as_json:
                _write(stdout, {"error": {"type": "KeyboardInterrupt", "message": str(stopped)}})
            raise typer.Exit(_INTERRUPTED) from None
        if int(os.environ.get("RANK", "0")) > 0:
            return  # the first of several processes tells
        if as_json:
            _write(stdout, result.data)
        else:
            text = printable(result.text, longest=None)
            print(text if result.as_it_is else fitted(text, stdout), file=stdout)
    if result.refused:
        raise typer.Exit(1)


def tell(text: str, style: str | None = None) -> None:
    """Say something on stderr, as it stands but for the ends of lines: no markup."""
    words = fitted(printable(text), sys.stderr)
    Console(stderr=True).print(words, style=style, markup=False, highlight=False, soft_wrap=True)


def fitted(text: str, stream: TextIO) -> str:
    """Return text with its lines broken between words where somebody sees them on a terminal.

    A file, or another program, gets each line whole.
    """
    width = _width(stream)
    return text if width is None else wrapped(text, width)


def _width(stream: TextIO) -> int | None:
    if os.environ.get("COLUMNS", "").isdecimal():
        return max(_NARROWEST, int(os.environ["COLUMNS"]))
    return max(_NARROWEST, Console(file=stream).width) if stream.isatty() else None


@contextlib.contextmanager
def working(words: str) -> Iterator[None]:
    """Show that something without a measurable end is going on, if there is somebody to see it."""
    with Console(stderr=True).status(words):
        yield


def plain(value: Any) -> Any:
    """Return data that JSON can hold: records as mappings, numbers that are not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def _write(stdout: TextIO, data: dict[str, Any]) -> None:
    stdout.write(json.dumps(plain(data), indent=2, allow_nan=False) + "\n")
    stdout.flush()


@contextlib.contextmanager
def _only_for_the_result(as_json: bool) -> Iterator[TextIO]:
    """Keep stdout for the result: with ``--json``, whatever else is written there goes to stderr.

    Also what is written below Python's own streams, by libraries in C and by child processes.
    """
    if not as_json:
        yield sys.stdout
        return
    stdout = sys.stdout
    if stdout is not sys.__stdout__:
        with contextlib.redirect_stdout(sys.stderr):
            yield stdout
        return
    stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            open(kept, "w", encoding="utf-8", closefd=False) as result,
            contextlib.redirect_stdout(sys.stderr),
        ):
            yield result
    finally:
        stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show our own warnings as one sentence, without the line of code that they come from."""
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, HfLoRAWarning):
            tell(f"warning: {message}", style="yellow")
        else:
            usual(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", HfLoRAWarning)
        warnings.showwarning = show
        yield
