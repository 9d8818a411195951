"""Whether a way to compute LoRA diverges more often than another, in 16 bits at high rates.

    python -m examples.benchmarks.stability run           # goes on where it ended
    python -m examples.benchmarks.stability report

Two real models in bfloat16, AdamW without clipping, many starts; a start is the same for all arms:
the same first A, B of zeros, the same examples in the same order.

| arm      | what it is                                                                     |
|----------|--------------------------------------------------------------------------------|
| peft     | PEFT as it comes, which keeps its adapters in float32 and casts x to them       |
| peft16   | PEFT with `autocast_adapter_dtype=False`: adapters in bfloat16                   |
| composed | hf_lora's way for few rows: PyTorch's operations, the update in float32          |
| fused    | hf_lora's way for many rows: one function, all its products in bfloat16          |

On a processor that has no products of bfloat16 they are computed in float32 and rounded once
(:mod:`examples.benchmarks.wide_products`), which is the same arithmetic; hf_lora's fused way, which
computes updates in float32 there, is held to bfloat16.

A run is one line of JSON, written when it is finished, so that the study can be stopped at any
moment and gather runs in several processes with a file each.
"""

import copy
import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
)

import hf_lora
from examples import assets
from examples.benchmarks import wide_products
from examples.benchmarks.arms import LINEAR
from examples.spelling import encode
from hf_lora.functional import composed
from hf_lora.layers import fusing

ARMS = ("peft", "peft16", "composed", "fused")
FEW_ROWS = {"composed": 1 << 40, "fused": 0}
R, STEPS, RATES = 16, 60, (1e-3, 3e-4)
ARITHMETIC = 2
"""Stands in every row. Raise it with any change to what an arm computes, to the last bit; so runs
before and after are not mixed, and both stay on file. 1: composed rounded an update before it added
it to the base's output."""

HIGH = 10.0
"""A gradient norm above this counts as an outbreak; in runs that go well it is below 5."""

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and what it learns."""

    base: Callable[[], PreTrainedModel]
    targets: list[str]
    train: Rows
    test: Rows
    collate: Callable[[Rows], dict[str, torch.Tensor]]
    size: int
    """Rows in a batch."""


def smollm2() -> Task:
    """SmolLM2-135M-Instruct and the quickstart's spellings; the loss counts every token."""
    folder = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = (
        [
            {**row, "labels": row["input_ids"]}
            for row in (encode(tokenizer, *pair) for pair in pairs)
        ]
        for pairs in assets.spellings(held_out=200)
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return Task(
        lambda: copy.deepcopy(loaded),  # a load takes as long as many steps
        LINEAR,
        train,
        test,
        DataCollatorForSeq2Seq(tokenizer),
        8,
    )


def minilm() -> Task:
    """all-MiniLM-L6-v2 under a frozen head of random weights, and the moods of words."""
    folder = assets.minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    torch.manual_seed(0)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    loaded.to(torch.bfloat16)
    train, test = (
        [{**tokenizer(word), "label": label} for word, label in rows]
        for rows in assets.sentiments(held_out=500)
    )
    targets = ["query", "key", "value", r"attention\.output\.dense", r"\d\.output\.dense"]
    targets = [*targets, r"intermediate\.dense"]
    collate = DataCollatorWithPadding(tokenizer)
    return Task(lambda: copy.deepcopy(loaded), targets, train, test, collate, 32)


TASKS = {"SmolLM2": smollm2, "MiniLM": minilm}
RUNS = Path(__file__).parent / "results" / "stability.jsonl"
"""What has been run so far."""


def adapted(arm: str, task: Task, seed: int) -> nn.Module:
    """Return the model with one arm's adapters, which start as every arm's do."""
    base = task.base().train()
    # of deterministic forwards, so that arms differ in their arithmetic alone
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = hf_lora.wrap(base, targets=task.targets, r=R, alpha=2 * R, train=())
    layers = [path for path, module in model.named_modules() if hasattr(module, "lora_A")]
    if arm.startswith("peft"):
        model = _peft(hf_lora.unwrap(model), layers, autocast=arm == "peft")
    else:
        compute_as(arm)
    generator = torch.Generator().manual_seed(seed)
    factors = [p for name, p in model.named_parameters() if ".lora_A" in name]
    assert len(factors) == len(layers)
    with torch.no_grad():
        for a_RI in factors:
            bound = a_RI.shape[1] ** -0.5
            a_RI.copy_(torch.empty(a_RI.shape).uniform_(-bound, bound, generator=generator))
    return model


def compute_as(arm: str) -> None:
    """Have hf_lora's layers compute as one of its arms, in all models."""
    composed.FEW_ROWS = FEW_ROWS[arm]
    fusing.update_type = lambda kind, dtype: dtype


def _peft(base: nn.Module, layers: list[str], autocast: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=layers)
    return get_peft_model(base, config, autocast_adapter_dtype=autocast)  # type: ignore[arg-type]


def trained(arm: str, task: Task, seed: int, rate: float) -> dict[str, Any]:
    """Train once and return what came of it: held-out loss, the last ten batches', all norms."""
    began = time.process_time()
    model = adapted(arm, task, seed)
    rows = list(task.train)
    random.Random(seed).shuffle(rows)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=rate, fused=True)
    losses, norms = [], []
    for step in range(STEPS):
        batch = task.collate([rows[(step * task.size + i) % len(rows)] for i in range(task.size)])
        loss = model(**batch).loss
        loss.backward()
        norms.append(nn.utils.get_total_norm([p.grad.float() for p in moving]).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "held_out": round(held_out(model.eval(), task), 6),
        "trained": round(statistics.fmean(losses[-10:]), 4),
        "norms": [float(f"{each:.3g}") for each in norms],
        "seconds": round(time.process_time() - began, 1),
    }


@torch.no_grad()
def held_out(model: nn.Module, task: Task) -> float:
    """Return the mean loss on rows that were not trained on."""
    parts = [task.test[i : i + 50] for i in range(0, len(task.test), 50)]
    return statistics.fmean(model(**task.collate(part)).loss.item() for part in parts)


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the finished runs of several files, without a last line that was cut off."""
    lines = [line for file in files if file.exists() for line in file.read_text().split("\n")]
    return [json.loads(line) for line in lines if line.endswith("}")]


app = typer.Typer(add_completion=False, callback=wide_products.install)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="file of the runs; grows")] = RUNS,
    tasks: Annotated[str, typer.Option(help="which models")] = ",".join(TASKS),
    rates: Annotated[str, typer.Option(help="which rates")] = ",".join(map(str, RATES)),
    arms: Annotated[str, typer.Option(help="which arms")] = ",".join(ARMS),
    starts: Annotated[int, typer.Option(help="how many starts")] = 30,
    first: Annotated[int, typer.Option(help="number of the first")] = 0,
) -> None:
    """Train what is not in the file yet, start after start."""
    torch.set_num_threads(1)
    made = {name: TASKS[name]() for name in tasks.split(",")}
    done = {
        (r["task"], r["rate"], r["seed"], r["arm"])
        for r in read([out])
        if r["arithmetic"] == ARITHMETIC
    }
    if out.exists() and not out.read_bytes().endswith(b"\n"):
        with out.open("a") as stream:
            stream.write("\n")  # behind a line that was cut off
    for seed in range(first, first + starts):
        for name, task in made.items():
            for rate in map(float, rates.split(",")):
                for arm in arms.split(","):
                    if (name, rate, seed, arm) in done:
                        continue
                    found = trained(arm, task, seed, rate)
                    of = {"arithmetic": ARITHMETIC, "products": wide_products.now()}
                    line = {"task": name, "rate": rate, "seed": seed, "arm": arm, **of, **found}
                    with out.open("a") as stream:
                        stream.write(json.dumps(line) + "\n")
                    told = f"held out {found['held_out']:.4f}, norm {max(found['norms']):.1f}"
                    print(f"{name} {rate:g} start {seed} {arm}: {told}", flush=True)


@app.command()
def report(
    files: Annotated[list[Path] | None, typer.Argument(help="of runs, instead of ours")] = None,
    arithmetic: Annotated[int, typer.Option(help="which arithmetic's")] = ARITHMETIC,
) -> None:
    """Print a table of the runs in these files: what is in all arms of a start, side by side."""
    runs = read(files or [RUNS])
    print("\n".join(table(r for r in runs if r["arithmetic"] == arithmetic)))


def table(runs: Iterable[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table; intervals are of 95 %.

    Shares have Wilson's interval. Means and differences have the bootstrap's, and differences are
    those of equal starts. A loss that is not finite counts as infinite.
    """
    lines = [
        f"| model, rate | arm | starts | norm above {HIGH:g} | held out: mean | worst | "
        "mean above peft's, equal starts |",
        "|---" * 7 + "|",
    ]
    for (name, rate), by_seed in _starts(runs):
        theirs = [_loss(each["peft"]) for each in by_seed]
        for arm in ARMS:
            ours = [each[arm] for each in by_seed]
            losses = [_loss(each) for each in ours]
            high = sum(any(not norm <= HIGH for norm in each["norms"]) for each in ours)
            above = [a - b if a != b else 0.0 for a, b in zip(losses, theirs, strict=True)]
            lines.append(
                f"| {name}, {rate:g} | {arm} | {len(ours)} | {high / len(ours):.0%} "
                f"({_share(high, len(ours))}) | {_mean(losses)} | {max(losses):.3f} | "
                f"{_mean(above) if arm != 'peft' else ''} |"
            )
    return lines


def _starts(
    runs: Iterable[dict[str, Any]],
) -> Iterator[tuple[tuple[str, float], list[dict[str, dict[str, Any]]]]]:
    """Return the starts that every arm has run, by model and rate."""
    found: dict[tuple[str, float], dict[int, dict[str, dict[str, Any]]]] = {}
    for each in runs:
        seeds = found.setdefault((each["task"], each["rate"]), {})
        seeds.setdefault(each["seed"], {})[each["arm"]] = each
    for key, seeds in found.items():
        complete = [by_arm for _, by_arm in sorted(seeds.items()) if by_arm.keys() == set(ARMS)]
        if complete:
            yield key, complete


def _loss(run: dict[str, Any]) -> float:
    return run["held_out"] if math.isfinite(run["held_out"]) else math.inf


def _share(count: int, of: int, z: float = 1.96) -> str:
    """Return Wilson's interval of a share."""
    p, each = count / of, z * z / of
    middle, half = p + each / 2, z * math.sqrt(p * (1 - p) / of + each / of / 4)
    low, high = ((middle + sign * half) / (1 + each) for sign in (-1, 1))
    return f"{max(low, 0):.0%} to {high:.0%}"


def _mean(values: list[float]) -> str:
    """Return the mean and the bootstrap's interval of it."""
    if not all(map(math.isfinite, values)):
        return f"{statistics.fmean(values):.3f}"
    low, high = interval(values)
    return f"{statistics.fmean(values):.3f} ({low:.3f} to {high:.3f})"


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """Return the bootstrap's interval of the mean, of 95 %."""
    drawn = random.Random(0)
    means = sorted(statistics.fmean(drawn.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


if __name__ == "__main__":
    app()
