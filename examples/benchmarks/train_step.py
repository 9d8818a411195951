"""How long a training step takes, as a ratio to the frozen model's own forward and backward.

    python -m examples.benchmarks.train_step --help
    python -m examples.benchmarks.train_step                         # the row of the README
    python -m examples.benchmarks.train_step --dropout 0.05 --dtype float32 --rounds 40

One thread; the arms take turns in one process. Others who use the machine make a step longer and
never shorter, so the shortest of all rounds is the one that tells; but where the machine's own
speed changes from one second to the next, the steps of a round are what can be compared, and the
median of their ratios is told, too.
"""

import json
import operator
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from examples.benchmarks.arms import ARMS, Work, arm, step


class Timed(NamedTuple):
    """How long a step takes."""

    seconds: float
    """The shortest of all rounds."""

    ratio: float
    """To the frozen model's step of the same round: the median of all rounds."""


def measure(work: Work, arms: tuple[str, ...], rounds: int) -> dict[str, Timed]:
    """Return how long each arm's step takes."""
    return timed({name: step(arm(name, work), work) for name in arms}, rounds)


def timed(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, Timed]:
    """Return how long each step takes; they take turns, "frozen" among them."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        run()
    for _ in range(rounds):
        for name, run in steps.items():
            taken[name].append(seconds_of(run))
    floor = taken["frozen"]
    return {
        name: Timed(min(own), statistics.median(map(operator.truediv, own, floor)))
        for name, own in taken.items()
    }


def seconds_of(run: Callable[[], None]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def show(work: Work, found: dict[str, Timed]) -> None:
    """Print each shortest time, its ratio to the frozen model's, and the median of the ratios."""
    print(work)
    frozen = found["frozen"].seconds
    for name, (seconds, ratio) in found.items():
        least = f"{seconds * 1e3:9.2f} ms  {seconds / frozen:.3f}"
        print(f"  {name:16s} {least}  median {ratio:.3f}", flush=True)


def main(
    hidden: int = 576,
    ffn: int = 1536,
    layers: int = 8,
    tokens: int = 512,
    dtype: str = "bfloat16",
    targets: Annotated[str, typer.Option(help="all-linear or qv")] = "all-linear",
    r: int = 16,
    dropout: float = 0.0,
    head: Annotated[bool, typer.Option(help="with SmolLM2's head and loss")] = False,
    rounds: int = 30,
    arms: Annotated[str, typer.Option(help="which, separated by commas")] = ",".join(ARMS),
    out: Annotated[Path | None, typer.Option(help="append the result as a line of JSON")] = None,
) -> None:
    """Measure one training step of a Llama."""
    torch.set_num_threads(1)
    work = Work(hidden, ffn, layers, tokens, getattr(torch, dtype), targets, r, dropout, head)
    found = measure(work, tuple(arms.split(",")), rounds)
    show(work, found)
    if out is not None:
        record = {name: one._asdict() for name, one in found.items()}
        with out.open("a") as file:
            file.write(json.dumps({"work": str(work), "arms": record}) + "\n")


if __name__ == "__main__":
    typer.run(main)
