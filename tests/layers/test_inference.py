"""A few rows without gradients, as generation has them: the plain formula, rounded once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_lora
from hf_lora.layers import inference
from hf_lora.model.registry import registry_of
from tests.rounding import assert_rounded_alike

IN, OUT = 24, 40


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def model(host: nn.Module | None = None, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    host = nn.Linear(IN, OUT) if host is None else host
    found = hf_lora.wrap(nn.Sequential(host).to(dtype), "0", r=4, **fields)
    hf_lora.add_adapter(found, "b", "0", r=7, rslora=True)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return found.eval()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call went this way."""
    found: list[bool] = []
    original = inference.at_inference

    def noted(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        y = original(layer, x)
        found.append(y is not None)
        return y

    monkeypatch.setattr("hf_lora.layers.dispatch.at_inference", noted)
    return found


def plain(found: Any, x: torch.Tensor) -> torch.Tensor:
    registry_of(found).routing.plain = True
    try:
        return found(x)
    finally:
        registry_of(found).routing.plain = False


def exact(found: Any, x: torch.Tensor, weights: dict[str, float]) -> torch.Tensor:
    layer, x = found[0], x.double()
    y = F.linear(x, dense(layer), bias(layer))
    for name, factor in weights.items():
        a, b = (t.double() for t in layer.lora_pair(name))
        y = y + factor * layer.lora_slots[name].scaling * (x @ a.T) @ b.T
    return y


def dense(layer: Any) -> torch.Tensor:
    weight = layer._parameters["weight"].double()
    return weight.T if layer.fan_in_fan_out else weight


def bias(layer: Any) -> torch.Tensor | None:
    return None if layer.bias is None else layer.bias.double()


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "no bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
}
CHOICES = [{"default": 1.0}, {"b": 0.5}, {"default": 1.0, "b": -2.0}]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("weights", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_it_is_the_formula(
    taken: list[bool], host: str, weights: dict[str, float], dtype: torch.dtype
):
    found = model(HOSTS[host](), dtype)
    hf_lora.activate(found, weights)
    trials = []
    for shape in ((IN,), (1, IN), (1, 1, IN), (3, 2, IN)):
        x = torch.randn(shape, dtype=dtype)
        kept = x.clone()
        y = found(x)
        assert torch.equal(x, kept)
        assert y.dtype == dtype
        trials.append((y, plain(found, x), exact(found, x, weights)))
    assert taken == [True, False] * 4
    if dtype is torch.float64:
        for y, _, right in trials:
            torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
    else:
        assert_rounded_alike(*trials)


@torch.no_grad()
def test_without_an_adapter_it_is_the_base(taken: list[bool]):
    found, x = model(), torch.randn(2, IN)
    with hf_lora.no_adapter(found):
        assert torch.equal(found(x), found[0].base(x))
    assert taken == [True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whoever_writes_the_factors_is_heard(mode: Any):
    found, x = model(), torch.randn(2, IN)
    with mode():
        before = found(x)
    found[0].lora_B.data.mul_(2.0)
    with mode():
        after, base = found(x), found[0].base(x)
        torch.testing.assert_close(after - base, 2 * (before - base))
    found[0].lora_B.data = torch.zeros_like(found[0].lora_B)
    with mode():
        assert torch.equal(found(x), found[0].base(x))


class Echo(nn.Linear):
    """Keeps its output, so that whoever writes into it changes what is kept."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.kept = super().forward(input)
        return self.kept


@torch.no_grad()
def test_an_output_that_is_somebody_elses_is_not_written_to(taken: list[bool]):
    found, x = model(Echo(IN, OUT)), torch.randn(2, IN)
    y = found(x)
    assert taken == [True]
    assert torch.equal(found[0].kept, F.linear(x, found[0].weight, found[0].bias))
    assert not torch.equal(found[0].kept, y)


@torch.no_grad()
def test_what_is_no_such_case_goes_another_way(taken: list[bool]):
    found, x = model(dropout=0.5), torch.randn(2, IN)
    many = torch.randn(500, IN)
    found(many)
    with torch.autocast("cpu", torch.bfloat16):
        assert found(x).dtype == torch.bfloat16
    torch.vmap(found)(x)
    found.train()
    found(x)
    with torch.enable_grad():
        found(x)
    assert not any(taken)
    found.eval()
    found(x)
    assert taken[-1]


@torch.no_grad()
def test_weights_that_are_computed_are_asked_of_the_host():
    found = nn.Sequential(nn.Linear(IN, OUT))
    nn.utils.parametrizations.weight_norm(found[0])
    hf_lora.wrap(found, "0", r=4)
    nn.init.normal_(found[0].lora_B)
    x = torch.randn(2, IN)
    torch.testing.assert_close(found(x), plain(found, x))
