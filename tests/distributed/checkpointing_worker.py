"""DeepSpeed's own activation checkpointing: layers that run again do what their forward did."""

import torch

import hf_lora
from tests.tiny import Net, rows, scramble


def gradients(way) -> dict[str, torch.Tensor]:
    """Return the gradients of a forward inside of a choice and a backward outside."""
    model = hf_lora.wrap(Net(), ["q_proj", "v_proj"], adapter="a", r=2)
    hf_lora.add_adapter(model, "b", ["q_proj", "v_proj"], r=2)
    scramble(model)
    with hf_lora.use_adapter(model, {"b": 0.5}):
        y = way(model, rows().requires_grad_())
    y.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    """Say that both ways do what a plain backward does."""
    wanted = gradients(lambda model, x: model(x))
    from deepspeed.runtime.activation_checkpointing import checkpointing

    for name in ("checkpoint", "non_reentrant_checkpoint"):
        found = gradients(getattr(checkpointing, name))
        assert found.keys() == wanted.keys(), name
        assert all(torch.allclose(found[key], wanted[key], rtol=1e-4) for key in wanted), name
    print("the same")
