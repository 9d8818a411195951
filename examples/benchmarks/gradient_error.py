"""How far each way's gradients are from float32's in training in bfloat16.

    python -m examples.benchmarks.gradient_error run --tasks MiniLM --starts 4
    python -m examples.benchmarks.gradient_error report

A run of PEFT's is stopped at several steps; there each arm of :mod:`examples.benchmarks.stability`
gets the same factors and the same batch, and the gradients of all factors are compared with those
of the same model in float32, whose weights are those of bfloat16. The float32 model of ``peft16``
has its factors rounded, too, as they are its own: what counts is arithmetic, not what is stored.

A distance is that of all gradients as one vector, relative to its length. Most of it comes from the
base, which every arm computes in bfloat16, and is other chance in each arm; so arms are compared in
the ratio to PEFT's at the same state, in the geometric mean over many states.
"""

import dataclasses
import itertools
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from examples.benchmarks import wide_products
from examples.benchmarks.stability import (
    ARITHMETIC,
    ARMS,
    FEW_ROWS,
    TASKS,
    Task,
    adapted,
    compute_as,
    interval,
    read,
)

STATES = (1, 3, 6, 10, 18, 30)
"""Steps of training; at 0 only the B's have gradients."""

FOUND = Path(__file__).parent / "results" / "gradient_error.jsonl"
Tensors = list[torch.Tensor]


def factors(model: nn.Module) -> list[nn.Parameter]:
    """Return all A's and then all B's, in the order of the layers: every arm's alike."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for kind in (".lora_A", ".lora_B") for name, p in named if kind in name]


def models(task: Task) -> dict[str, nn.Module]:
    """Return every arm's model, and one in float32."""
    wide = dataclasses.replace(task, base=lambda: task.base().float())
    return {arm: adapted(arm, task, 0) for arm in ARMS} | {"float32": adapted("composed", wide, 0)}


def gradients(
    arm: str, model: nn.Module, state: Tensors, batch: dict[str, torch.Tensor]
) -> Tensors:
    """Return the gradients of an arm's model at a state."""
    if arm in FEW_ROWS:
        compute_as(arm)
    own = factors(model)
    with torch.no_grad():
        for parameter, value in zip(own, state, strict=True):
            parameter.copy_(value)
    model(**batch).loss.backward()
    found = [parameter.grad.float() for parameter in own]
    model.zero_grad()
    return found


def distance(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Return how far tensors, taken as one vector, are away, relative to its length."""

    def square(tensors: Sequence[torch.Tensor]) -> float:
        return math.fsum(each.double().square().sum().item() for each in tensors)

    off = [one - other for one, other in zip(found, exact, strict=True)]
    return math.sqrt(square(off) / square(exact))


def compared(
    of: dict[str, nn.Module], state: Tensors, batch: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Return each arm's distances at a state: of all gradients, and of one tensor's, the median."""
    exact = gradients("composed", of["float32"], state, batch)
    rounded = [each.bfloat16().float() for each in state]
    of_rounded = gradients("composed", of["float32"], rounded, batch)
    found: dict[str, Any] = {}
    for arm in ARMS:
        own = gradients(arm, of[arm], state, batch)
        right = of_rounded if arm == "peft16" else exact
        each = [distance([one], [other]) for one, other in zip(own, right, strict=True)]
        found[arm] = {
            "all": _short(distance(own, right)),
            "median": _short(statistics.median(each)),
        }
    return found | {"rounded": _short(distance(of_rounded, exact))}


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def states(
    task: Task, seed: int, rate: float
) -> Iterator[tuple[int, Tensors, dict[str, torch.Tensor]]]:
    """Train as PEFT and yield the step, the factors and the batch at each state."""
    model = adapted("peft", task, seed)
    own = factors(model)
    optimizer = torch.optim.AdamW(own, lr=rate, fused=True)
    rows = list(task.train)
    random.Random(seed).shuffle(rows)
    for step in range(max(STATES) + 1):
        batch = task.collate([rows[(step * task.size + i) % len(rows)] for i in range(task.size)])
        if step in STATES:
            yield step, [p.detach().clone() for p in own], batch
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


app = typer.Typer(add_completion=False, callback=wide_products.install)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="file of the states; grows")] = FOUND,
    tasks: Annotated[str, typer.Option(help="which models")] = ",".join(TASKS),
    rate: Annotated[float, typer.Option(help="learning rate")] = 1e-3,
    starts: Annotated[int, typer.Option(help="how many starts")] = 4,
    first: Annotated[int, typer.Option(help="number of the first")] = 0,
) -> None:
    """Compare the arms at the states of several starts; those on file are left out."""
    torch.set_num_threads(1)
    made = {name: TASKS[name]() for name in tasks.split(",")}
    arms = {name: models(task) for name, task in made.items()}
    done = {
        (line["task"], line["rate"], line["seed"], line["step"])
        for line in read([out])
        if line["arithmetic"] == ARITHMETIC
    }
    for seed, name in itertools.product(range(first, first + starts), made):
        if all((name, rate, seed, step) in done for step in STATES):
            continue
        for step, state, batch in states(made[name], seed, rate):
            if (name, rate, seed, step) in done:
                continue
            found = {"arithmetic": ARITHMETIC} | compared(arms[name], state, batch)
            line = {"task": name, "rate": rate, "seed": seed, "step": step, **found}
            with out.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            print(name, seed, step, *(f"{arm} {found[arm]['all']:.4f}" for arm in ARMS), flush=True)


@app.command()
def report(
    files: Annotated[list[Path] | None, typer.Argument(help="of states, instead of ours")] = None,
) -> None:
    """Print a table of the states in these files."""
    for arithmetic, lines in itertools.groupby(
        sorted(read(files or [FOUND]), key=_arithmetic), key=_arithmetic
    ):
        print(f"Arithmetic {arithmetic}:\n")
        print("\n".join(table(list(lines))) + "\n")


def _arithmetic(line: dict[str, Any]) -> int:
    return line["arithmetic"]


def table(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table; intervals are the bootstrap's, of 95 %."""
    text = [
        "| model | arm | states | distance: mean | worst | ratio to peft's, same states |",
        "|---" * 6 + "|",
    ]
    for name in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == name]
        for arm in ARMS:
            far = [line[arm]["all"] for line in own]
            text.append(
                f"| {name} | {arm} | {len(own)} | {statistics.geometric_mean(far):.4f} | "
                f"{max(far):.4f} | {_ratio(own, arm) if arm != 'peft' else ''} |"
            )
    return text


def _ratio(lines: Sequence[dict[str, Any]], arm: str) -> str:
    """Return the geometric mean of the ratios of an arm's distances to PEFT's."""
    logs = [math.log(line[arm]["all"] / line["peft"]["all"]) for line in lines]
    middle, low, high = map(math.exp, (statistics.fmean(logs), *interval(logs)))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    app()
