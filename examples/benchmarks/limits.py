"""Where the time of a step goes, and how close it can come to the frozen model's.

    python -m examples.benchmarks.limits --dtype bfloat16

First the limit: in turns with the frozen model and hf_lora, the products that any exact LoRA needs
(forward h = x Aᵀ and y += h Bᵀ, backward dh = dy B, dB = hᵀ dy, dA = dhᵀ x and dx += dh A, those
of layers that read one tensor in one product where that is possible), on buffers that are not in
the cache, as in a model; no autograd, no Python around them, nothing computed again. With dropout
also what masks need: bits drawn, and three passes that apply them. Frozen plus that is the limit
for these operations.

Then what hf_lora's two promises add, measured in the same way: that nothing is kept above the
frozen model (x is made again from what the frozen model keeps, and h from it), and that factors
and their gradients are float32 (casts). Frozen plus all that is the limit for hf_lora.

At last where the difference lies: what each kind of operation takes in a step of either, as
PyTorch's profiler counts it, and what is left in the step that the profiler does not slow down:
Python, autograd's bookkeeping, and masks, which NumPy draws and applies.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from examples.benchmarks.arms import Work, arm, step
from examples.benchmarks.train_step import Timed, seconds_of, show, timed
from hf_lora.functional.dropout import keep_mask, masked, unpacked

GROUPS = (
    (1, (1, 1 / 3, 1 / 3), "norm"),
    (1, (1,), "attention"),
    (1, ("ffn", "ffn"), "norm"),
    ("ffn", (1,), "product"),
)
"""Of the groups of a layer: the input's width, the outputs' widths, what gives the input.

Widths are parts of `hidden`, or `ffn`.
"""

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::cat", "aten::clone"),
    "other elementwise": ("aten::mul", "aten::add", "aten::silu", "aten::pow", "aten::div"),
}
"""What the operations of a kind are called, or begin with."""

REST = "all other operations"
PYTHON = "Python, NumPy and bookkeeping"


def products(work: Work) -> Callable[[], None]:
    """Return a function that computes the products of all updates of the model, and their masks."""
    groups = [Group(work, inner, outs) for inner, outs, _ in groups_of(work)]
    forward, backward = (
        (Group.forward_masked, Group.backward_masked)
        if work.dropout
        else (Group.forward, Group.backward)
    )

    def run() -> None:
        kept = [forward(group) for group in groups]
        for group, one in zip(reversed(groups), reversed(kept), strict=True):
            backward(group, one)

    return run


def promises(work: Work) -> Callable[[], None]:
    """Return a function that computes x and h again and casts the factors and their gradients."""

    def new(*shape: int, dtype: torch.dtype = work.dtype) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype)

    groups = []
    for inner, outs, origin in groups_of(work):
        # a norm keeps float32; a product is made of two; attention's output is kept anyway
        dtype = torch.float32 if origin == "norm" else work.dtype
        made_of = [new(work.tokens, inner, dtype=dtype) for _ in range(1 + (origin == "product"))]
        sizes = [(work.r * len(outs), inner), *((out, work.r) for out in outs)]
        factors = [new(*size, dtype=torch.float32) for size in sizes]
        groups.append((made_of, factors, [new(*size) for size in sizes]))

    def run() -> None:
        for made_of, factors, gradients in groups:
            cast = [factor.to(work.dtype) for factor in factors]
            x = torch.mul(*made_of) if len(made_of) == 2 else made_of[0].to(work.dtype)
            if not work.dropout:
                torch.mm(x, cast[0].t())
            for gradient in gradients:
                gradient.float()

    return run


def groups_of(work: Work) -> list[tuple[int, list[int], str]]:
    """Return GROUPS with numbers for widths, of all layers of the model."""

    def width(part: float | str) -> int:
        return work.ffn if part == "ffn" else round(work.hidden * float(part))

    one = [(width(inner), [width(out) for out in outs], origin) for inner, outs, origin in GROUPS]
    return one * work.layers


class Group:
    """The buffers of layers that read one tensor, and the products of their updates on them."""

    def __init__(self, work: Work, inner: int, outs: list[int]):
        def new(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=work.dtype)

        n, self.r, self.p = work.tokens, work.r, work.dropout
        self.x, self.dx, self.a = new(n, inner), new(n, inner), new(self.r * len(outs), inner)
        self.layers = [(new(n, out), new(n, out), new(out, self.r)) for out in outs]
        self.left = new(n, inner)

    def forward(self) -> Sequence[torch.Tensor]:
        """Compute h and add to y."""
        h = torch.mm(self.x, self.a.t()).split(self.r, dim=1)
        for h_i, (y, _, b) in zip(h, self.layers, strict=True):
            y.addmm_(h_i, b.t())
        return h

    def backward(self, h: Sequence[torch.Tensor]) -> None:
        """Compute dh, dB and dA and add to dx."""
        dh = torch.cat(self.through_b(h), dim=1)
        torch.mm(dh.t(), self.x)
        self.dx.addmm_(dh, self.a)

    def through_b(self, h: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Compute dh, which is returned, and dB."""
        dh = []
        for h_i, (_, dy, b) in zip(h, self.layers, strict=True):
            dh.append(torch.mm(dy, b))
            torch.mm(h_i.t(), dy)
        return dh

    def forward_masked(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Do as :meth:`forward` does, with a mask for each layer; return masks and h."""
        (rows, features), kept = self.x.shape, []
        for a, (y, _, b) in zip(self.a.split(self.r), self.layers, strict=True):
            mask = keep_mask(rows, features, self.p, self.x.device)
            h = torch.mm(masked(self.x, unpacked(mask, features), out=self.left), a.t())
            y.addmm_(h, b.t())
            kept.append((mask, h))
        return kept

    def backward_masked(self, kept: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Do as :meth:`backward` does, through each layer's mask."""
        dh = self.through_b([h for _, h in kept])
        for dh_i, a, (mask, _) in zip(dh, self.a.split(self.r), kept, strict=True):
            keep = unpacked(mask, self.x.shape[1])
            torch.mm(dh_i.t(), masked(self.x, keep, out=self.left))
            part = torch.mm(dh_i, a)
            self.dx.add_(masked(part, keep, out=part))


def kind_of(operation: str) -> str:
    """Return the kind that an operation belongs to."""
    exact = (kind for kind, names in KINDS.items() if operation in names)
    begun = (kind for kind, names in KINDS.items() if operation.startswith(names))
    return next(exact, None) or next(begun, REST)


def where(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Return what each kind of operation takes in each step, as parts of the frozen step.

    The steps take turns, each once as it is and once under the profiler, and a round's times are
    compared with each other only; told is the median of all rounds.
    """
    parts: dict[str, list[Counter[str]]] = {name: [] for name in steps}
    for _ in range(rounds):
        taken = {name: seconds_of(run) for name, run in steps.items()}
        for name, run in steps.items():
            found = profiled(run)
            found[PYTHON] = taken[name] - found.total()
            scaled = {kind: seconds / taken["frozen"] for kind, seconds in found.items()}
            parts[name].append(Counter(scaled))
    kinds = (*KINDS, REST, PYTHON)
    return {
        name: {kind: statistics.median(one[kind] for one in own) for kind in kinds}
        for name, own in parts.items()
    }


def profiled(run: Callable[[], None]) -> Counter[str]:
    """Return the seconds that each kind of operation takes in a step."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    found: Counter[str] = Counter()
    for event in seen.key_averages():
        if event.key.startswith("aten::"):
            found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return found


def summed(found: dict[str, Timed], *names: str) -> Timed:
    """Return what several take together."""
    parts = [found[name] for name in names]
    return Timed(sum(part.seconds for part in parts), sum(part.ratio for part in parts))


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
    found = timed(steps | {"products": products(work), "promises": promises(work)}, rounds)
    found["limit"] = summed(found, "frozen", "products")
    found["limit of hf_lora"] = summed(found, "limit", "promises")
    show(work, found)
    apart = where(steps, max(rounds // 2, 1))
    for kind in apart["frozen"]:
        base, ours = (apart[name][kind] for name in ("frozen", "hf_lora"))
        print(f"  {kind:30s} {base:6.3f} {ours:6.3f}  {ours - base:+.3f}")
    if out is not None:
        arms = {name: one._asdict() for name, one in found.items()}
        record = {"work": str(work), "arms": arms, "kinds": apart}
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    typer.run(main)
