"""The same adapter written twice, for hf_lora and for PEFT, and what is compared of the two.

One layer of every model has a rank and a strength of its own, so that both ways of saying so
(our overrides, PEFT's patterns) are always part of the comparison.
"""

import re
from typing import Any

import peft
import torch
from torch import nn

from hf_lora.model.registry import registry_of
from tests.oracle.architectures import Architecture, Inputs

R, ALPHA = 4, 8.0
EXCEPTION = {"r": 3, "alpha": 7.0}
# What is promised of outputs in float32. Other processors' kernels stay ten times below it; for
# gradients, which amplify what is rounded, see tests.rounding.
TOLERANCE = 1e-5
# What an adapter must change at least for a comparison to say anything about it.
PLAIN = 0.05


def our_fields(architecture: Architecture, *, head: bool = False, **fields: Any) -> dict[str, Any]:
    """Return the arguments of ``hf_lora.wrap`` for this model."""
    return {
        "targets": list(architecture.targets),
        "r": R,
        "alpha": ALPHA,
        "overrides": {re.escape(architecture.exception): EXCEPTION},
        "train": [architecture.head] if head else [],
    } | fields


def peft_config(
    architecture: Architecture, *, head: bool = False, **fields: Any
) -> peft.LoraConfig:
    """Return PEFT's configuration of the same adapter."""
    exception = re.escape(architecture.exception)
    return peft.LoraConfig(
        **{
            "target_modules": list(architecture.targets),
            "r": R,
            "lora_alpha": ALPHA,
            "rank_pattern": {exception: EXCEPTION["r"]},
            "alpha_pattern": {exception: EXCEPTION["alpha"]},
            "modules_to_save": [architecture.head] if head else None,
        }
        | fields
    )


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 3) -> None:
    """Move everything that trains away from its start, as a training would: B is zero no more."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.1)


@torch.no_grad()
def logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return what the model answers."""
    return model(**inputs).logits


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value unless all are 0."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / (expected.abs().max() or 1)).item()


def our_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of the adapter's tensors under the names they have in a file."""
    gradients = {}
    for path, _, role, tensor in registry_of(model).tensors("default"):
        suffix = ".weight" if role in ("lora_A", "lora_B") else ""
        assert tensor.grad is not None, f"{path}.{role} has no gradient"
        gradients[f"base_model.model.{path}.{role}{suffix}"] = tensor.grad
    return gradients


def peft_gradients(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """Return the gradients of PEFT's tensors under the names they have in a file."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return peft.get_peft_model_state_dict(model, state_dict=gradients)


def backward(model: nn.Module, inputs: Inputs) -> None:
    """Run one training pass of a loss in which every logit weighs differently."""
    model.train()
    answers = model(**inputs).logits
    weights = torch.linspace(-1, 1, answers.numel(), dtype=answers.dtype).view_as(answers)
    (answers * weights).sum().backward()
