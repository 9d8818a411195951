"""torch.compile: one graph without a break, the right numbers, and no graph for a mere switch."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hf_lora
from tests.layers.test_fused import INPUTS, error, gradients, llama
from tests.oracle.adapting import scramble

CHOICES = ("default", "second", "default", ["default", "second"], "third", "second")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def several() -> Any:
    model = llama()
    hf_lora.add_adapter(model, "second", targets="all-linear", r=3)
    hf_lora.add_adapter(model, "third", targets=["q_proj"], r=2)
    with hf_lora.use_adapter(model, ["default", "second", "third"]):
        scramble(model)
    return model


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_of_one_graph_are_those_of_eager_execution(backend: str):
    model = llama()
    wanted = gradients(model, INPUTS)
    model.zero_grad(set_to_none=True)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    logits = compiled(**INPUTS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert error(found, wanted) < 1e-5
    assert counter.frame_count == 1


def test_inference_switches_among_loaded_adapters_with_one_graph():
    model = several().eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = []
    with torch.no_grad():
        for names in CHOICES:
            with hf_lora.use_adapter(model, names):
                found, wanted = compiled(**INPUTS).logits, model(**INPUTS).logits
            torch.testing.assert_close(found, wanted)
            seen.append(found)
        with hf_lora.no_adapter(model):
            torch.testing.assert_close(compiled(**INPUTS).logits, model(**INPUTS).logits)
        assert not torch.allclose(seen[0], seen[1], atol=1e-3)
        assert counter.frame_count == 1
        hf_lora.merge(model)
        torch.testing.assert_close(compiled(**INPUTS).logits, model(**INPUTS).logits)


def test_an_inactive_adapter_that_holds_nan_does_not_matter():
    model = several().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_second"):
                parameter.fill_(torch.nan)
        assert compiled(**INPUTS).logits.isfinite().all()


def test_training_compiles_once_for_each_choice_and_leaves_the_others_alone():
    model = several()
    hf_lora.unfreeze(model, "second")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names in ("default", "second", "default", "second"):
        model.zero_grad(set_to_none=True)
        with hf_lora.use_adapter(model, names):
            compiled(**INPUTS).logits.sum().backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None}
        assert reached
        assert all(n.endswith("_second") == (names == "second") for n in reached)
    assert counter.frame_count == 2
