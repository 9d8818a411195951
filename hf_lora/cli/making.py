"""The commands that make an adapter: ``init`` and ``train``."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lora.cli.options import Json, Patterns, command
from hf_lora.cli.output import execute


def init(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model, or its id on the Hub.")
    ] = None,
    data: Annotated[
        str | None, typer.Argument(help="A .jsonl, .json, .csv, .parquet, .txt, or a data set.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The recipe to write; not there yet.")
    ] = Path("run.yaml"),
    example: Annotated[
        str | None, typer.Option(help="Copy a shipped recipe and its data instead.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the folder or repo.")] = None,
    as_json: Json = False,
) -> None:
    """Write a recipe for a model and data, after a look at both."""
    if (example is None) == (model is None) or (example is None) != (data is not None):
        raise typer.BadParameter("say MODEL and DATA, or --example NAME")
    execute(
        lambda: (
            command("hf_lora.cli.commands.init").example(example, output)
            if example is not None
            else command("hf_lora.cli.commands.init").run(
                model, data, output, split=split, gguf_file=gguf_file
            )
        ),
        as_json=as_json,
    )


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML or JSON.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Adapter folder, instead of the recipe's.")
    ] = None,
    settings: Annotated[
        Patterns,
        typer.Option("--set", help="section.field=value, instead of the recipe's; repeatable."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="lora.r.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora.alpha.")] = None,
    lr: Annotated[str | None, typer.Option("--lr", help="trainer.learning_rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="trainer.num_train_epochs.")] = None,
    steps: Annotated[int | None, typer.Option(help="trainer.max_steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="trainer.per_device_train_batch_size.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="data.max_length, in tokens.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted training stopped.")
    ] = False,
    more: Annotated[
        float | None, typer.Option(help="Epochs to add to a finished training.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show rows, memory and time; train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as a recipe says: base, data, lora, trainer, output, push."""
    short = {
        "lora.r": rank,
        "lora.alpha": alpha,
        "trainer.lr": lr,
        "trainer.epochs": epochs,
        "trainer.max_steps": steps,
        "trainer.batch_size": batch_size,
        "data.max_length": max_length,
    }
    said = [f"{field}={value}" for field, value in short.items() if value is not None]
    every = [*(settings or []), *said]
    execute(
        lambda: (
            command("hf_lora.cli.commands.dry_run").run(recipe, settings=every, output=output)
            if dry_run
            else command("hf_lora.cli.commands.train").run(
                recipe, settings=every, output=output, resume=resume, more=more
            )
        ),
        as_json=as_json,
    )
