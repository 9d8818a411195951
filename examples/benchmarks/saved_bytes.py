"""What autograd keeps for the backward pass, in bytes per token and layer, counted exactly.

    python -m examples.benchmarks.saved_bytes                 # the rows of the report
    python -m examples.benchmarks.saved_bytes --dropout 0.05

Every tensor that is saved goes through a hook; each storage counts once, parameters and buffers do
not count. The input's gradient is asked for, so that the frozen model keeps what it needs, too.
What comes with each token is told from what is there once, however long the input is (adapters in
the type that is computed in), by counting with N and with 2 N tokens.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import nn

from examples.benchmarks.arms import Work, arm, forward

SAVING_ARMS = ("frozen", "peft", "peft16", "unfused", "hf_lora")


def saved_bytes(model: nn.Module, work: Work) -> int:
    """Return the bytes of all storages that one forward keeps."""
    found: dict[int, int] = {}
    held: list[torch.Tensor] = []  # nothing is freed in between, so no address comes twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    embedded = torch.randn(1, work.tokens, work.hidden, dtype=work.dtype)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, inputs = forward(model, embedded, None, torch.randn_like(embedded))
    own = (*model.parameters(), *model.buffers())
    for tensor in own:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    del loss, inputs
    return sum(found.values())


class Saved(NamedTuple):
    """Bytes that one layer keeps."""

    per_token: float
    once: float


def measure(work: Work) -> dict[str, Saved]:
    """Return what a layer keeps in each arm."""
    twice = dataclasses.replace(work, tokens=2 * work.tokens)
    counts = {}
    for name in SAVING_ARMS:
        model = arm(name, work)
        saved_bytes(model, work)  # what can be rebuilt is found out at the first step
        short, long = (saved_bytes(model, each) / work.layers for each in (work, twice))
        counts[name] = Saved((long - short) / work.tokens, 2 * short - long)
    return counts


def main(
    hidden: int = 576,
    ffn: int = 1536,
    layers: int = 4,
    tokens: int = 512,
    dtype: str = "bfloat16",
    targets: str = "all-linear",
    r: int = 16,
    dropout: float = 0.0,
    out: Annotated[Path | None, typer.Option(help="append the result as a line of JSON")] = None,
) -> None:
    """Count what one forward keeps."""
    work = Work(hidden, ffn, layers, tokens, getattr(torch, dtype), targets, r, dropout)
    counts = measure(work)
    print(work)
    frozen = counts["frozen"]
    for name, count in counts.items():
        more, once = count.per_token - frozen.per_token, count.once - frozen.once
        print(f"  {name:8s} {count.per_token:10,.0f} bytes  {more:+10,.0f}, once {once:+10,.0f}")
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps({name: saved._asdict() for name, saved in counts.items()}) + "\n")


if __name__ == "__main__":
    typer.run(main)
