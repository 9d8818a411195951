"""A training step with adapters on stacked experts, over the frozen experts and beside PEFT.

    python -m examples.benchmarks.experts                    # 64 experts of width 256, top-4
    python -m examples.benchmarks.experts --dtype float32 --tokens 512

A Qwen3-MoE with adapters on ``gate_up_proj`` and ``down_proj``, whole step with AdamW. The arms
take turns in one process; what decides is the ratio of the fastest steps. Bytes are those of what
autograd keeps for the backward pass without parameters, counted with the tokens given and with
twice as many: what comes with each token, and what is there however few there are.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeModel

import hf_lora
from examples.benchmarks.train_step import timed

ARMS = ("frozen", "peft", "hf_lora")
PARTS = ["experts.gate_up_proj", "experts.down_proj"]


class Work(NamedTuple):
    """One step to measure."""

    experts: int = 64
    width: int = 256
    top: int = 4
    hidden: int = 512
    layers: int = 2
    tokens: int = 2048
    r: int = 16
    dtype: torch.dtype = torch.bfloat16


def arm(name: str, work: Work) -> nn.Module:
    """Return one arm's model: the same weights in each, and the same factors."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=work.hidden,
        intermediate_size=work.width,
        moe_intermediate_size=work.width,
        num_experts=work.experts,
        num_experts_per_tok=work.top,
        num_hidden_layers=work.layers,
        num_attention_heads=work.hidden // 64,
        num_key_value_heads=work.hidden // 64,
        head_dim=64,
    )
    model = Qwen3MoeModel(config).to(work.dtype).train().requires_grad_(False)
    if name == "hf_lora":
        hf_lora.wrap(model, PARTS, r=work.r, alpha=2 * work.r)
    elif name == "peft":
        theirs = LoraConfig(
            r=work.r, lora_alpha=2 * work.r, target_modules=[], target_parameters=PARTS
        )
        model = get_peft_model(model, theirs)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.02)
    return model


def forward(model: nn.Module, work: Work) -> torch.Tensor:
    """Return a scalar that depends on every output; gradients flow to the input."""
    drawn = torch.Generator().manual_seed(2)
    shape = (1, work.tokens, work.hidden)
    inputs = torch.randn(shape, generator=drawn).to(work.dtype).requires_grad_()
    flow = torch.randn(shape, generator=drawn).to(work.dtype)
    return (model(inputs_embeds=inputs, use_cache=False).last_hidden_state * flow).sum()


def step(model: nn.Module, work: Work) -> Callable[[], None]:
    """Return a function that runs a whole step."""
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-5) if trains else None

    def run() -> None:
        forward(model, work).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


class Kept(NamedTuple):
    """What one forward keeps for the backward pass."""

    total: int
    largest: int


def kept(model: nn.Module, work: Work) -> Kept:
    """Return the bytes of all storages that autograd keeps, without those of parameters."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    held: list[torch.Tensor] = []  # nothing is freed in between, so no address comes twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward(model, work)
    del loss
    return Kept(sum(found.values()), max(found.values(), default=0))


def measure_bytes(work: Work) -> dict[str, dict[str, float]]:
    """Return what each arm keeps with each token, and once, in bytes a layer."""
    rows = {}
    for name in ARMS:
        model = arm(name, work)
        one, two = (kept(model, work._replace(tokens=n * work.tokens)) for n in (1, 2))
        rows[name] = {
            "per token and layer": (two.total - one.total) / work.tokens / work.layers,
            "once, a layer": (2 * one.total - two.total) / work.layers,
            "MiB": one.total / 2**20,
        }
    return rows


def measure_steps(work: Work, rounds: int) -> dict[str, dict[str, float]]:
    """Return the fastest step of each arm and its ratio to that of the frozen experts."""
    steps = {name: step(arm(name, work), work) for name in ARMS}
    times = timed(steps, rounds)
    floor = times["frozen"].seconds
    return {
        name: {
            "seconds": each.seconds,
            "ratio": each.seconds / floor,
            "median ratio": each.ratio,
        }
        for name, each in times.items()
    }


def main(
    experts: int = 64,
    width: int = 256,
    top: int = 4,
    hidden: int = 512,
    layers: int = 2,
    tokens: int = 2048,
    r: int = 16,
    dtype: str = "bfloat16",
    rounds: int = 5,
    out: Annotated[Path | None, typer.Option(help="append the result as a line of JSON")] = None,
) -> None:
    """Measure steps and what is kept for the backward pass."""
    work = Work(experts, width, top, hidden, layers, tokens, r, getattr(torch, dtype))
    stack = experts * 3 * width * hidden * work.dtype.itemsize * layers / 2**20
    print(f"{work}\nthe experts themselves: {stack:.1f} MiB")
    found = {"bytes": measure_bytes(work), "steps": measure_steps(work, rounds)}
    for rows in found.values():
        for name, row in rows.items():
            print(f"{name:>8}  " + ", ".join(f"{key} {value:,.3f}" for key, value in row.items()))
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps({"work": str(work), **found}) + "\n")


if __name__ == "__main__":
    typer.run(main)
