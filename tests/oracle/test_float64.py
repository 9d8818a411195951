"""Forward and gradients in float64 against the formula itself: the base with ``W + s · B A``.

PEFT computes in the order that we do; here the oracle multiplies the factors out, so that a
mistake which both libraries made would show.
"""

import torch
from torch import nn

import hf_lora
from hf_lora.model.registry import registry_of
from tests.oracle.adapting import ALPHA, EXCEPTION, PLAIN, R, distance, our_fields, scramble
from tests.oracle.architectures import Architecture, Inputs, each_architecture
from tests.snapshot import low_rank

TOLERANCE = 1e-12

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def in_float64(architecture: Architecture) -> tuple[nn.Module, Inputs]:
    """Return the model and its inputs, every floating-point number in float64."""
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in architecture.inputs().items()
    }
    return architecture.build().double(), inputs


def by_formula(architecture: Architecture, factors: Factors) -> torch.Tensor:
    """Return the logits of an unwrapped model whose weights are ``W + alpha/r · B A``."""
    base, inputs = in_float64(architecture)
    weights = {}
    for path, (a, b) in factors.items():
        exceptional = path.endswith(architecture.exception)
        alpha, r = (EXCEPTION["alpha"], EXCEPTION["r"]) if exceptional else (ALPHA, R)
        assert a.shape[0] == b.shape[1] == r
        delta = (b @ a) * (alpha / r)
        weight = base.get_parameter(f"{path}.weight").detach()
        transposed = architecture.name == "gpt2"
        weights[f"{path}.weight"] = weight + (delta.T if transposed else delta)
    return torch.func.functional_call(base, weights, (), inputs).logits


def weigh(answers: torch.Tensor) -> torch.Tensor:
    """Return a loss in which every logit weighs differently."""
    weights = torch.linspace(-1, 1, answers.numel(), dtype=torch.float64)
    return (answers * weights.view_as(answers)).sum()


@each_architecture
def test_forward_and_gradients_are_the_formulas(architecture: Architecture) -> None:
    model, inputs = in_float64(architecture)
    plain = model(**inputs).logits.detach()
    hf_lora.wrap(model, **our_fields(architecture))
    scramble(model)
    layers = low_rank(registry_of(model))
    assert all(layer.lora_A.dtype == torch.float64 for layer in layers.values())
    factors = {
        path: (
            layer.lora_A.detach().clone().requires_grad_(),
            layer.lora_B.detach().clone().requires_grad_(),
        )
        for path, layer in layers.items()
    }

    actual = model(**inputs).logits
    expected = by_formula(architecture, factors)
    assert distance(expected.detach(), plain) > PLAIN
    assert distance(actual.detach(), expected.detach()) < TOLERANCE

    weigh(actual).backward()
    weigh(expected).backward()
    for path, (a, b) in factors.items():
        assert a.grad.abs().max() > 0, path
        assert distance(layers[path].lora_A.grad, a.grad) < TOLERANCE, path
        assert distance(layers[path].lora_B.grad, b.grad) < TOLERANCE, path
