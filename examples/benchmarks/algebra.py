"""Arithmetic on adapters: hf_lora from the factors, PEFT's `add_weighted_adapter`, a dense SVD.

    python -m examples.benchmarks.algebra --out algebra.json

One layer of 2048 x 2048 in float32, one thread, the ways in turns. A sum of four adapters of rank
16 is brought back to rank 16; and a change of full rank, whose singular values fall as the root of
their number, is extracted at rank 32. Errors are those of the tensors that come out, in float64,
over the least that a rank can have.
"""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from hf_lora.algebra.layers import Term, combined
from hf_lora.algebra.method import SVD, Method
from hf_lora.files.data import LayerTensors
from hf_lora.functional.randomized import distance, largest_product
from hf_lora.kinds.lora import LOW_RANK
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import LORA_A, LORA_B

Work = Callable[[], Any]
OURS = "hf_lora"
ADAPTERS, RANK, ALPHA, EXTRACTED = 4, 16, 32.0, 32


def factors(width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of each adapter."""
    drawn = torch.Generator().manual_seed(0)
    return [
        (torch.randn(RANK, width, generator=drawn), torch.randn(width, RANK, generator=drawn))
        for _ in range(ADAPTERS)
    ]


def ours(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Work:
    """Return what adds them up as `hf_lora.combine` does once a layer is read, error included."""
    terms = []
    for a, b in pairs:
        tensors = {LORA_A: a, LORA_B: b}
        shapes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
        held = LayerTensors(LOW_RANK, {role: role for role in tensors}, shapes)
        terms.append(Term(1.0, LayerConfig(RANK, ALPHA), held, tensors))

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        layer = combined({"layer": terms}, Method(SVD, rank=RANK), None)["layer"]
        return layer.tensors[LORA_A], layer.tensors[LORA_B] * layer.config.scaling

    return work


def peft(pairs: list[tuple[torch.Tensor, torch.Tensor]], full_matrices: bool) -> Work:
    """Return what adds them up as PEFT does."""
    from peft import LoraConfig, get_peft_model

    width = pairs[0][0].shape[1]
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), config, "0")
    for i in range(1, len(pairs)):
        model.add_adapter(str(i), config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for i, (a, b) in enumerate(pairs):
            layer.lora_A[str(i)].weight.copy_(a)
            layer.lora_B[str(i)].weight.copy_(b)

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        names = [str(i) for i in range(len(pairs))]
        if "sum" in layer.lora_A:
            model.delete_adapter("sum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(
                names,
                [1.0] * len(pairs),
                "sum",
                combination_type="svd",
                svd_rank=RANK,
                svd_full_matrices=full_matrices,
            )
        a, b = layer.lora_A["sum"].weight.detach(), layer.lora_B["sum"].weight.detach()
        return a, b * layer.scaling["sum"]

    return work


def dense(matrix: torch.Tensor, rank: int) -> Work:
    """Return what finds the nearest product from all singular values."""

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return vh[:rank], u[:, :rank] * s[:rank]

    return work


def extracted(matrix: torch.Tensor, rank: int) -> Work:
    """Return what `hf_lora.extract` does with a tensor that it has read, error included."""

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        drawn = torch.Generator().manual_seed(0)
        found = largest_product(matrix[None], rank, None, generator=drawn)
        distance(matrix[None].clone(), found)
        return found.right[0], found.left[0]

    return work


def changed(width: int) -> torch.Tensor:
    """Return a change of full rank whose k-th singular value is k to the power of -1/2."""
    drawn = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(width, width, generator=drawn))[0] for _ in range(2))
    return (left * torch.arange(1, width + 1) ** -0.5) @ right


def measured(ways: dict[str, Work], exact: torch.Tensor, rank: int, rounds: int) -> dict[str, Any]:
    """Run ways in turns; return the shortest time of each, and how far it is above the least."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(rounds):
        for name, work in ways.items():
            for _ in range(20 if name == OURS else 1):
                start, spent = time.perf_counter(), time.process_time()
                results[name] = work()
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - spent)
    values = torch.linalg.svdvals(exact)
    least = float(values[rank:].norm())
    found = {}
    for name, (a, b) in results.items():
        lost = float((exact - b.double() @ a.double()).norm())
        found[name] = {
            "milliseconds": min(seconds[name]) * 1e3,
            "processor_milliseconds": min(processor[name]) * 1e3,
            "error": lost / float(values.norm()),
            "above_the_least": lost / least - 1,
        }
    return found


def main(
    out: Annotated[Path | None, typer.Option(help="Where to write the numbers, as JSON.")] = None,
    width: Annotated[int, typer.Option(help="Of the layer.")] = 2048,
    rounds: Annotated[int, typer.Option(help="How often each way runs in turn.")] = 3,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    found = measure(width, rounds)
    print(json.dumps(found, indent=2))
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n")


def measure(width: int, rounds: int) -> dict[str, Any]:
    """Return the times and errors of both tasks."""
    pairs = factors(width)
    total = sum(b.double() @ a.double() * (ALPHA / RANK) for a, b in pairs)
    assert isinstance(total, torch.Tensor)
    sums = {
        OURS: ours(pairs),
        "peft svd": peft(pairs, False),
        "peft svd, full_matrices": peft(pairs, True),
        "dense": dense(total.float(), RANK),
    }
    change = changed(width)
    extractions = {OURS: extracted(change, EXTRACTED), "dense": dense(change, EXTRACTED)}
    return {
        "width": width,
        "sum of four, rank 16": measured(sums, total, RANK, rounds),
        "extraction, rank 32": measured(extractions, change.double(), EXTRACTED, rounds),
    }


if __name__ == "__main__":
    typer.run(main)
