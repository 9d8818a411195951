"""What it costs to merge an adapter into a model in memory, beside PEFT.

    python -m examples.benchmarks.merge_in_memory                 # SmolLM2's shapes, processor time
    python -m examples.benchmarks.merge_in_memory --peak          # 1.1 billion numbers, memory

Random Llamas in bfloat16 with an adapter of rank 16 on all linear layers, one thread. The arms take
turns. The peak is what the process has most at any time of the merge above what it had before it,
in a process of its own for each arm.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Sizes(NamedTuple):
    """A Llama's."""

    vocabulary: int = 49_152
    hidden: int = 576
    ffn: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3


SMOL = Sizes()
LARGE = Sizes(32_000, 2048, 5632, 22, 32, 4)


def base(sizes: Sizes) -> nn.Module:
    """Return the model, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    return LlamaForCausalLM._from_config(config)


def trained(model: Any) -> Any:
    """Give every B numbers, the same in each arm."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def ours(sizes: Sizes) -> nn.Module:
    """Return our arm's model."""
    return trained(hf_lora.wrap(base(sizes), TARGETS, r=16, alpha=32))


def pefts(sizes: Sizes) -> nn.Module:
    """Return PEFT's."""
    return trained(
        get_peft_model(base(sizes), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    )


FOR_GOOD: dict[str, tuple[Callable[[Sizes], Any], Callable[[Any], Any]]] = {
    "hf_lora": (ours, hf_lora.merge_and_unwrap),
    "peft": (pefts, lambda model: model.merge_and_unload()),
}
UNDONE: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "hf_lora": (hf_lora.merge, hf_lora.unmerge),
    "peft": (lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()),
}


def seconds_of(run: Callable[[Any], Any], model: Any) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    run(model)
    return time.process_time() - start


def measured(sizes: Sizes, rounds: int) -> dict[str, dict[str, float]]:
    """Return the shortest time of each verb in each arm, in seconds."""
    models = {name: make(sizes) for name, (make, _) in FOR_GOOD.items()}
    taken: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, (merge, unmerge) in UNDONE.items():
            for verb, run in (("merge", merge), ("unmerge", unmerge)):
                spent = taken.setdefault(verb, {}).setdefault(name, [])
                spent.append(seconds_of(run, models[name]))
    del models
    for _ in range(rounds):
        for name, (make, merge) in FOR_GOOD.items():
            spent = taken.setdefault("for good", {}).setdefault(name, [])
            spent.append(seconds_of(merge, make(sizes)))
    return {verb: {name: min(each) for name, each in arms.items()} for verb, arms in taken.items()}


def peak_of(arm: str, sizes: Sizes) -> dict[str, float]:
    """Return how much memory a merge for good takes at most above what the model has, in MiB."""
    make, merge = FOR_GOOD[arm]
    model = make(sizes)
    before, most, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    merge(model)
    done.set()
    watcher.join()
    return {"before": before, "above": max(most[0] - before, 0.0)}


def resident() -> float:
    """Return the memory of this process, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(rounds: int = 7, peak: bool = False, arm: str = "") -> None:
    """Print the figures, or with ``--arm`` those of one arm's memory as JSON."""
    torch.set_num_threads(1)
    if arm:
        print(json.dumps(peak_of(arm, LARGE)))
    elif peak:
        for name in FOR_GOOD:
            command = [sys.executable, "-m", "examples.benchmarks.merge_in_memory", "--arm", name]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            said = json.loads(found.stdout.splitlines()[-1])
            print(f"{name:8s} {said['above']:8.0f} MiB above {said['before']:.0f}", flush=True)
    else:
        for verb, arms in measured(SMOL, rounds).items():
            peft = arms["peft"]
            said = "  ".join(f"{name} {1e3 * each:7.1f} ms" for name, each in arms.items())
            print(f"{verb:9s} {said}  {arms['hf_lora'] / peft:.2f} of PEFT's", flush=True)


if __name__ == "__main__":
    typer.run(main)
