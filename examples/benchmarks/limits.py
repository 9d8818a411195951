"""Where the time of a step goes, and how close it can come to the frozen model's.

    python -m examples.benchmarks.limits --dtype bfloat16

First the limit: in turns with the frozen model and hf_lora, the products that any exact LoRA needs
(forward h = x Aᵀ and y += h Bᵀ, backward dh = dy B, dB = hᵀ dy, dA = dhᵀ x and dx += dh A, those
of layers that read one tensor in one product where that is possible), on buffers that are not in
the cache, as in a model; no autograd, no Python around them, nothing computed again. Frozen plus
that is the limit for PyTorch's own operations.

Then where the difference lies: what each kind of operation takes in a step of either, as PyTorch's
profiler counts it, and what is left for Python and autograd's bookkeeping in the step that the
profiler does not slow down.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from examples.benchmarks.arms import Work, arm, step
from examples.benchmarks.train_step import Timed, show, timed

GROUPS = ((1, (1, 1 / 3, 1 / 3)), (1, (1,)), (1, ("ffn", "ffn")), ("ffn", (1,)))
"""Input width and output widths of the groups of a layer, as parts of `hidden`, or `ffn`."""

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::cat", "aten::clone"),
    "masks": ("aten::bitwise_and",),
    "other elementwise": ("aten::mul", "aten::add", "aten::silu", "aten::pow", "aten::div"),
}
"""What the operations of a kind are called, or begin with."""

REST = "all other operations"
PYTHON = "Python and bookkeeping"


def products(work: Work) -> Callable[[], None]:
    """Return a function that computes the products of all updates of the model."""

    def width(part: float | str) -> int:
        return work.ffn if part == "ffn" else round(work.hidden * float(part))

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=work.dtype)

    n, r = work.tokens, work.r
    groups = []
    for _ in range(work.layers):
        for inner, outs in GROUPS:
            i, os = width(inner), [width(out) for out in outs]
            layers = [(new(n, o), new(n, o), new(o, r)) for o in os]
            groups.append((new(n, i), new(n, i), new(r * len(os), i), layers))

    def run() -> None:
        kept = []
        for x, _, a, layers in groups:
            h = torch.mm(x, a.t()).split(r, dim=1)
            for h_i, (y, _, b) in zip(h, layers, strict=True):
                y.addmm_(h_i, b.t())
            kept.append(h)
        for (x, dx, a, layers), h in zip(reversed(groups), reversed(kept), strict=True):
            dh = []
            for h_i, (_, dy, b) in zip(h, layers, strict=True):
                dh.append(torch.mm(dy, b))
                torch.mm(h_i.t(), dy)
            together = torch.cat(dh, dim=1)
            torch.mm(together.t(), x)
            dx.addmm_(together, a)

    return run


def kind_of(operation: str) -> str:
    """Return the kind that an operation belongs to."""
    exact = (kind for kind, names in KINDS.items() if operation in names)
    begun = (kind for kind, names in KINDS.items() if operation.startswith(names))
    return next(exact, None) or next(begun, REST)


def where(run: Callable[[], None], seconds: float, steps: int = 8) -> Counter[str]:
    """Return the seconds that each kind of operation takes in a step that takes ``seconds``."""
    least: Counter[str] = Counter()
    for _ in range(steps):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            run()
        found: Counter[str] = Counter()
        for event in seen.key_averages():
            if event.key.startswith("aten::"):
                found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        if not least or found.total() < least.total():
            least = found
    least[PYTHON] = seconds - least.total()
    return least


def main(
    hidden: int = 576,
    ffn: int = 1536,
    layers: int = 8,
    tokens: int = 512,
    dtype: str = "bfloat16",
    r: int = 16,
    dropout: float = 0.0,
    rounds: Annotated[int, typer.Option(help="the shortest of all counts")] = 30,
    out: Annotated[Path | None, typer.Option(help="append the result as a line of JSON")] = None,
) -> None:
    """Measure the frozen model, hf_lora, and the products alone, and take both steps apart."""
    torch.set_num_threads(1)
    work = Work(hidden, ffn, layers, tokens, getattr(torch, dtype), "all-linear", r, dropout)
    steps = {name: step(arm(name, work), work) for name in ("frozen", "hf_lora")}
    found = timed(steps | {"products": products(work)}, rounds)
    frozen, needed = found["frozen"], found["products"]
    found["limit"] = Timed(frozen.seconds + needed.seconds, 1 + needed.ratio)
    show(work, found)
    apart = {name: where(run, found[name].seconds) for name, run in steps.items()}
    for kind in (*KINDS, REST, PYTHON):
        base, ours = (apart[name][kind] for name in ("frozen", "hf_lora"))
        share = (ours - base) / frozen.seconds
        print(f"  {kind:24s} {base * 1e3:8.2f} {ours * 1e3:8.2f} ms  {share:+.3f}")
    if out is not None:
        arms = {name: one._asdict() for name, one in found.items()}
        record = {"work": str(work), "arms": arms, "kinds": apart}
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    typer.run(main)
