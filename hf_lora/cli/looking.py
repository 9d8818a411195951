"""The commands that tell: ``report``, ``schema`` and ``skill``."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lora.cli.options import Json, command
from hf_lora.cli.output import execute
from hf_lora.cli.schema import describe_schema
from hf_lora.cli.skill import skill as print_skill


def report(
    adapters: Annotated[list[str], typer.Argument(help="Adapter folders, or ids on the Hub.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page, one file of HTML.")
    ] = Path("report.html"),
    base: Annotated[
        str | None, typer.Option(help="Folder of the base: norms over those of its weights.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a page about adapters: where they act, spectra, losses, size, who can serve them."""
    execute(
        lambda: command("hf_lora.cli.commands.report").run(adapters, output, base),
        as_json=as_json,
    )


def schema(
    name: Annotated[str | None, typer.Argument(help="Of one command; else of all.")] = None,
    as_json: Json = False,
) -> None:
    """Show what --json of each command holds."""
    execute(lambda: describe_schema(name), as_json=as_json)


def skill(as_json: Json = False) -> None:
    """Print a skill file: how an agent uses this command."""
    execute(print_skill, as_json=as_json)
