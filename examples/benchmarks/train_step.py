"""How long a training step takes, as a ratio to the frozen model's own forward and backward.

    python -m examples.benchmarks.train_step --help
    python -m examples.benchmarks.train_step                         # the row of the README
    python -m examples.benchmarks.train_step --dropout 0.05 --dtype float32 --rounds 40

One thread; the arms take turns in one process, and the shortest of all rounds counts: a machine
that others use, too, makes a step longer and never shorter.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from examples.benchmarks.arms import ARMS, Work, arm, step


def measure(work: Work, arms: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Return the shortest time of each arm's step, in seconds."""
    return shortest({name: step(arm(name, work), work) for name in arms}, rounds)


def shortest(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the shortest time of each step, in seconds; they take turns."""
    best = dict.fromkeys(steps, float("inf"))
    for run in steps.values():
        run()
    for _ in range(rounds):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def show(work: Work, best: dict[str, float]) -> None:
    """Print each time, and its ratio to the frozen model's."""
    print(work)
    for name, seconds in best.items():
        print(f"  {name:8s} {seconds * 1e3:9.2f} ms  {seconds / best['frozen']:.3f}", flush=True)


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
    best = measure(work, tuple(arms.split(",")), rounds)
    show(work, best)
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps({"work": str(work), "seconds": best}) + "\n")


if __name__ == "__main__":
    typer.run(main)
