"""A training loop of one's own with accelerate, on one process or many, interrupted and resumed.

    python examples/accelerate_loop.py              # no pretrained model and no Hub; a CPU will do
    python examples/accelerate_loop.py --quick      # fewer steps
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --cpu      # the same with two processes

A tiny Llama, which knows only that letters follow each other in the alphabet, learns from an
adapter to say it backwards. The loop stops halfway; a new one takes up the state that it left.
"""

import argparse
import itertools
import string
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lora

OUTPUT = Path("outputs/accelerate_loop")
LETTERS = string.ascii_lowercase
LENGTH, BATCH = 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    options = parser.parse_args()
    steps = 100 if options.quick else 300
    set_seed(0)
    accelerator = Accelerator(cpu=options.cpu)
    hf_lora.register(accelerator)

    base = tiny_llama()
    train(accelerator, base, rows(1), steps)
    accelerator.print(f"base: {recite(accelerator, base)}")
    weights = base.state_dict()

    model = hf_lora.wrap(base, targets="all-linear", r=4)
    loss = train(accelerator, model, rows(-1), steps // 2, save=OUTPUT / "state")
    accelerator.print(f"with the adapter, halfway: {recite(accelerator, model)}, loss {loss:.3f}")

    model = tiny_llama()
    model.load_state_dict(weights)
    model = hf_lora.wrap(model, targets="all-linear", r=4)
    loss = train(accelerator, model, rows(-1), steps - steps // 2, load=OUTPUT / "state")
    accelerator.print(f"with the adapter, resumed: {recite(accelerator, model)}, loss {loss:.3f}")
    accelerator.save_model(model, OUTPUT / "adapter")
    accelerator.end_training()


def train(
    accelerator: Accelerator,
    model: Any,
    data: list[torch.Tensor],
    steps: int,
    save: Path | None = None,
    load: Path | None = None,
) -> float:
    """Take some steps and return the last loss; go on from a state, or leave one there."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batches = DataLoader(data, BATCH // accelerator.num_processes, shuffle=True)
    accelerator.free_memory()
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    if load is not None:
        accelerator.load_state(str(load))
    model.train()
    again = itertools.chain.from_iterable(itertools.repeat(batches))
    loss = torch.tensor(0.0)
    for ids in itertools.islice(again, steps):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(str(save))
    return float(loss)


def rows(direction: int) -> list[torch.Tensor]:
    """Return the alphabet from every letter, forwards or backwards, around its end."""
    steps = torch.arange(LENGTH) * direction
    return [(start + steps) % len(LETTERS) for start in range(len(LETTERS))]


def tiny_llama() -> LlamaForCausalLM:
    """Return a model of one layer that knows nothing yet."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(LETTERS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


@torch.no_grad()
def recite(accelerator: Accelerator, model: Any, start: str = "m") -> str:
    """Return what the model says after a letter."""
    ids = torch.tensor([[LETTERS.index(start)]], device=accelerator.device)
    model.eval()
    for _ in range(LENGTH - 1):
        best = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    return "".join(LETTERS[i] for i in ids[0].tolist())


if __name__ == "__main__":
    main()
