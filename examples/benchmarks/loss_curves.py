"""Whether training with hf_lora reaches the same loss as with PEFT: SmolLM2, the same data.

    python -m examples.benchmarks.loss_curves --steps 300 --seeds 3 --out loss_curves.json

The same examples in the same order, AdamW, one learning rate; a seed decides the order and the
start of A. Both libraries draw A from the same distribution, in their own way. A batch of 8 has
some 100 tokens, so few that hf_lora leaves the products to PyTorch; `hf_lora_fused` makes it take
its own function, which casts A and B to the model's type, as it does for more tokens.
"""

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import hf_lora
from examples import assets
from examples.benchmarks.arms import LINEAR
from examples.spelling import encode
from hf_lora.functional import composed

R, RATE = 16, 5e-4
FEW_ROWS = composed.FEW_ROWS


def adapted(library: str, base: nn.Module, seed: int) -> nn.Module:
    """Return the model with fresh adapters of one library."""
    torch.manual_seed(seed)
    if library.startswith("hf_lora"):
        composed.FEW_ROWS = 0 if library == "hf_lora_fused" else FEW_ROWS
        return hf_lora.wrap(base, targets="all-linear", r=R, alpha=2 * R)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=LINEAR)
    return get_peft_model(base, config)  # type: ignore[arg-type]


def train(
    model: nn.Module, rows: list[dict[str, Any]], collate: Any, steps: int, size: int
) -> list[float]:
    """Return the loss of every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    losses = []
    model.train()
    for step in range(steps):
        batch = collate([rows[(step * size + i) % len(rows)] for i in range(size)])
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: list[dict[str, Any]], collate: Any) -> float:
    """Return the mean loss on rows that were not trained on."""
    model.eval()
    parts = [rows[i : i + 50] for i in range(0, len(rows), 50)]
    return sum(model(**collate(part)).loss.item() for part in parts) / len(parts)


def main(
    steps: int = 300,
    seeds: int = 3,
    batch: int = 8,
    first: int = 0,
    libraries: str = "peft,hf_lora,hf_lora_fused",
    out: Path = Path("loss_curves.json"),
) -> None:
    """Train with both libraries and write every loss."""
    folder = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collate = DataCollatorForSeq2Seq(tokenizer)
    train_pairs, test_pairs = assets.spellings(held_out=200)
    test = [encode(tokenizer, *pair) for pair in test_pairs]
    runs = []
    for seed in range(first, first + seeds):
        rows = [encode(tokenizer, *pair) for pair in train_pairs]
        random.Random(seed).shuffle(rows)
        for library in libraries.split(","):
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            model = adapted(library, base, seed)
            start = time.perf_counter()
            losses = train(model, rows, collate, steps, batch)
            seconds = time.perf_counter() - start
            final = held_out_loss(model, test, collate)
            runs.append({"library": library, "seed": seed, "held_out": final, "losses": losses})
            tail = sum(losses[-50:]) / len(losses[-50:])
            print(f"{library:8s} seed {seed}: last 50 steps {tail:.4f}, held out {final:.4f}, "
                  f"{seconds:.0f} s", flush=True)  # fmt: skip
            out.write_text(json.dumps(runs))


if __name__ == "__main__":
    typer.run(main)
