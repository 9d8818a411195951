"""Options that several commands have, and how what carries a command out is imported."""

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lora.cli.output import working
from hf_lora.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, words on stderr.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Subfolder = Annotated[str | None, typer.Option(help="Folder inside, for adapters with a name.")]
OtherBase = Annotated[
    str | None, typer.Option(help="Folder or id of the base, instead of the adapter's.")
]
Patterns = list[str] | None

# What these warn of when they are imported is about their own speed, not about the command; the
# last tells each time that it tries again, and why it gave up is in our error.
_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree", "huggingface_hub")


def command(module: str) -> Any:
    """Import the module that carries out a command; this takes seconds."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    with working("loading torch and transformers"):
        return importlib.import_module(module)


def weighed(adapters: list[str]) -> dict[str, float]:
    """Return each adapter with its factor, which may stand behind it.

    Raises:
        ConfigError: What stands there is no number, or an adapter is named twice.
    """
    found: dict[str, float] = {}
    for each in adapters:
        name, sign, factor = each.rpartition("=")
        known = sign and not Path(each).exists()
        try:
            weight = float(factor) if known else 1.0
        except ValueError:
            raise ConfigError(f"{each!r}: {factor!r} is no factor; write NAME=0.5") from None
        name = name if known else each
        if name in found:
            raise ConfigError(f"{name!r} is named twice; give it one factor")
        found[name] = weight
    return found
