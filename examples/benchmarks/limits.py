"""How close a step can come to the frozen model: the products of the updates, nothing around them.

    python -m examples.benchmarks.limits --dtype bfloat16

Times, in turns with the frozen model and hf_lora, the products that any exact LoRA needs: forward
h = x Aᵀ and y += h Bᵀ, backward dh = dy B, dB = hᵀ dy, dA = dhᵀ x and dx += dh A, those of layers
that read one tensor in one product where that is possible, on buffers that are not in the cache, as
in a model. No autograd, no Python around them, nothing computed again. Frozen plus that is the
limit for PyTorch's own operations.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import typer

from examples.benchmarks.arms import Work, arm, step
from examples.benchmarks.train_step import shortest, show

GROUPS = ((1, (1, 1 / 3, 1 / 3)), (1, (1,)), (1, ("ffn", "ffn")), ("ffn", (1,)))
"""Input width and output widths of the groups of a layer, as parts of `hidden`, or `ffn`."""


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


def main(
    hidden: int = 576,
    ffn: int = 1536,
    layers: int = 8,
    tokens: int = 512,
    dtype: str = "bfloat16",
    r: int = 16,
    rounds: Annotated[int, typer.Option(help="the shortest of all counts")] = 30,
) -> None:
    """Measure the frozen model, hf_lora, and the products alone."""
    torch.set_num_threads(1)
    work = Work(hidden, ffn, layers, tokens, getattr(torch, dtype), "all-linear", r)
    steps = {name: step(arm(name, work), work) for name in ("frozen", "hf_lora")}
    steps["products"] = products(work)
    best = shortest(steps, rounds)
    show(work, best | {"limit": best["frozen"] + best["products"]})


if __name__ == "__main__":
    typer.run(main)
