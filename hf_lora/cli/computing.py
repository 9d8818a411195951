"""The commands that compute with adapters, from ``combine`` to ``diff``."""

from pathlib import Path
from typing import Annotated

import typer

from hf_lora.cli.options import Json, command
from hf_lora.cli.output import execute

_RUN = "hf_lora.cli.commands.algebra"
Output = Annotated[Path, typer.Option("--output", "-o", help="Adapter folder to write.")]
Rank = Annotated[int | None, typer.Option("--rank", "-r", help="Highest rank of a layer.")]
Energy = Annotated[
    float | None, typer.Option(help="Share of each layer's squared norm to keep, such as 0.99.")
]
Dtype = Annotated[str | None, typer.Option(help="Type of the tensors; else the adapters' widest.")]
CheckBase = Annotated[
    bool, typer.Option("--check-base/--any-base", help="Whether the bases must be the same.")
]


def combine(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter folders or ids; NAME=0.5 weighs, NAME=-1 subtracts")
    ],
    output: Output,
    method: Annotated[
        str | None, typer.Option(help="cat (the exact sum), svd (of a lower rank), ties, dare.")
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    density: Annotated[float | None, typer.Option(help="What ties and dare keep.")] = None,
    seed: Annotated[int, typer.Option(help="Of dare.")] = 0,
    dtype: Dtype = None,
    check_base: CheckBase = True,
    as_json: Json = False,
) -> None:
    """Make one adapter of several, exactly or nearest; needs no base model."""
    execute(
        lambda: command(_RUN).combined(
            adapters,
            output,
            method=method,
            rank=rank,
            energy=energy,
            density=density,
            seed=seed,
            dtype=dtype,
            check_base=check_base,
        ),
        as_json=as_json,
    )


def resize(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, or its id on the Hub.")],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Give an adapter a lower rank, and say what that loses."""
    execute(
        lambda: command(_RUN).resized(adapter, output, rank=rank, energy=energy, dtype=dtype),
        as_json=as_json,
    )


def similarity(
    one: Annotated[str, typer.Argument(help="Adapter folder, or its id on the Hub.")],
    other: Annotated[str, typer.Argument(help="Another of the same base.")],
    check_base: CheckBase = True,
    as_json: Json = False,
) -> None:
    """Compare what two adapters do to each layer: the cosine of their updates, and their norms."""
    execute(lambda: command(_RUN).similar(one, other, check_base=check_base), as_json=as_json)


def extract(
    base: Annotated[str, typer.Argument(help="Folder of the base model, or its id on the Hub.")],
    tuned: Annotated[str, typer.Argument(help="Of the model that was fine-tuned in full.")],
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Annotated[str | None, typer.Option(help="Of the tensors; else as the model's.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Of the base on the Hub.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the tuned model on the Hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that came with the tuned model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make an adapter of what a full fine-tuning changed, reading both models tensor by tensor."""
    execute(
        lambda: command(_RUN).extracted(
            base,
            tuned,
            output,
            rank=rank,
            energy=energy,
            dtype=dtype,
            base_revision=base_revision,
            revision=revision,
            trust_remote_code=trust_remote_code,
        ),
        as_json=as_json,
    )


def diff(
    one: Annotated[str, typer.Argument(help="Adapter or model: a folder, or its id on the Hub.")],
    other: Annotated[str, typer.Argument(help="Another of the same kind.")],
    as_json: Json = False,
) -> None:
    """Compare two adapters or two models: configurations, layers, and which tensors are equal."""
    execute(lambda: command(_RUN).differing(one, other), as_json=as_json)
