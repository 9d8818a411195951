"""A training step of some rows of a large embedding, over the frozen model's and beside PEFT's.

    python -m examples.benchmarks.rows                      # 100 rows of 49,152 x 576, tied
    python -m examples.benchmarks.rows --dtype float32 --layers 30

SmolLM2's sizes, with fewer layers by default, which is harder: what rows cost does not depend on
them. The frozen arm's gradients flow down to the embeddings' output, as they must for rows. Steps
are whole, with AdamW. The arms take turns in one process; what decides is the ratio of the fastest
steps. "in full" trains all rows.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lora
from examples.benchmarks.train_step import timed

ARMS = ("frozen", "hf_lora", "peft", "in full")
EMBEDDING = "embed_tokens"
FILES = "adapter_model.safetensors"


class Work(NamedTuple):
    """One step to measure."""

    rows: int = 100
    vocabulary: int = 49_152
    hidden: int = 576
    layers: int = 8
    tokens: int = 512
    tied: bool = True
    dtype: torch.dtype = torch.bfloat16

    def ids(self) -> list[int]:
        """Return the rows that train: the last ones, as if they had been added."""
        return list(range(self.vocabulary - self.rows, self.vocabulary))


def arm(name: str, work: Work) -> nn.Module:
    """Return one arm's model: the same weights in each."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.hidden * 8 // 3,
        num_hidden_layers=work.layers,
        num_attention_heads=max(work.hidden // 64, 1),
        num_key_value_heads=max(work.hidden // 192, 1),
        tie_word_embeddings=work.tied,
    )
    model = LlamaForCausalLM(config).to(work.dtype).train().requires_grad_(False)
    if name == "frozen":
        model.enable_input_require_grads()
    elif name == "hf_lora":
        hf_lora.wrap(model, (), train_rows={EMBEDDING: work.ids()})
    elif name == "in full":
        model.get_input_embeddings().weight.requires_grad_(True)
    else:
        rows = {"target_modules": "dummy-target-modules", "trainable_token_indices": work.ids()}
        model = get_peft_model(model, LoraConfig(**rows))
    return model


def loss(model: nn.Module, work: Work) -> torch.Tensor:
    """Return a loss in whose text each of the rows stands."""
    drawn = torch.Generator().manual_seed(2)
    ids = torch.randint(0, work.vocabulary, (1, work.tokens), generator=drawn)
    own = torch.tensor(work.ids())
    ids[0, : len(own)] = own[: work.tokens]
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def step(model: nn.Module, work: Work) -> Callable[[], None]:
    """Return a function that runs a whole step."""
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-4) if trains else None

    def run() -> None:
        loss(model, work).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def file_size(name: str, model: nn.Module) -> int:
    """Return the bytes of what trains on the disk."""
    if name in ("frozen", "in full"):
        return sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        return (Path(folder) / FILES).stat().st_size


def measure(work: Work, rounds: int) -> dict[str, dict[str, float]]:
    """Return the fastest step of each arm, its ratio to the frozen model's, and its file."""
    models = {name: arm(name, work) for name in ARMS}
    steps = {name: step(model, work) for name, model in models.items()}
    times = timed(steps, rounds)
    floor = times["frozen"].seconds
    return {
        name: {
            "seconds": each.seconds,
            "ratio": each.seconds / floor,
            "median ratio": each.ratio,
            "MB on disk": file_size(name, models[name]) / 1e6,
        }
        for name, each in times.items()
    }


def main(
    rows: int = 100,
    vocabulary: int = 49_152,
    hidden: int = 576,
    layers: int = 8,
    tokens: int = 512,
    tied: bool = True,
    dtype: str = "bfloat16",
    rounds: int = 7,
    out: Annotated[Path | None, typer.Option(help="append the result as a line of JSON")] = None,
) -> None:
    """Measure steps and files."""
    work = Work(rows, vocabulary, hidden, layers, tokens, tied, getattr(torch, dtype))
    print(work)
    found = measure(work, rounds)
    for name, row in found.items():
        print(f"{name:>8}  " + ", ".join(f"{key} {value:,.3f}" for key, value in row.items()))
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps({"work": str(work), "steps": found}) + "\n")


if __name__ == "__main__":
    typer.run(main)
