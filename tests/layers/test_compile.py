"""torch.compile: one graph without a break, the right numbers, and no graph for a mere switch."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hf_lora
from tests.layers.fused_models import INPUTS, each_adapter, gradients, in_float64, llama
from tests.oracle.adapting import scramble
from tests.rounding import Trial, assert_rounded_alike

CHOICES = ("default", "second", "default", ["default", "second"], "third", "second")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def several() -> Any:
    model = llama(layers=1)
    hf_lora.add_adapter(model, "second", targets="all-linear", r=3)
    hf_lora.add_adapter(model, "third", targets=["q_proj"], r=2)
    with hf_lora.use_adapter(model, ["default", "second", "third"]):
        scramble(model)
    return model


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_of_one_graph_are_those_of_eager_execution(backend: str):
    model = llama()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    trials: list[Trial] = []
    for _ in each_adapter(model, count=4):
        eager, exact = gradients(model, INPUTS), in_float64(model, INPUTS)
        trials.append((gradients(compiled, INPUTS), eager, exact))
    assert_rounded_alike(*trials)
    assert counter.frame_count == 1


def test_inference_switches_among_loaded_adapters_with_one_graph():
    model = several().eval()
    exact = copy.deepcopy(model).double()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = []
    with torch.no_grad():
        for names in CHOICES:
            with hf_lora.use_adapter(model, names):
                found, wanted = compiled(**INPUTS).logits, model(**INPUTS).logits
            with hf_lora.use_adapter(exact, names):
                assert_rounded_alike((found, wanted, exact(**INPUTS).logits))
            seen.append(found)
        with hf_lora.no_adapter(model), hf_lora.no_adapter(exact):
            found, wanted = compiled(**INPUTS).logits, model(**INPUTS).logits
            assert_rounded_alike((found, wanted, exact(**INPUTS).logits))
        assert not torch.allclose(seen[0], seen[1], atol=1e-3)
        assert counter.frame_count == 1
        hf_lora.merge(model)
        hf_lora.merge(exact)
        found, wanted = compiled(**INPUTS).logits, model(**INPUTS).logits
        assert_rounded_alike((found, wanted, exact(**INPUTS).logits))


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


def test_inference_of_threads_with_adapters_of_their_own_has_one_graph():
    model = several().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    names = ["default", "second", {"default": 0.5, "third": -1.0}, []]
    wanted = []
    with torch.no_grad():
        for each in names:
            hf_lora.activate(model, each)
            wanted.append(model(**INPUTS).logits)
            torch.testing.assert_close(compiled(**INPUTS).logits, wanted[-1])
    assert counter.frame_count == 1
    found: dict[int, torch.Tensor] = {}
    together = threading.Barrier(len(names), timeout=300)

    @torch.no_grad()
    def serve(number: int) -> None:
        with hf_lora.use_adapter(model, names[number]):
            together.wait()
            found[number] = compiled(**INPUTS).logits

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in enumerate(wanted):
        torch.testing.assert_close(found[number], logits)


def test_training_reads_a_choice_that_is_the_threads_own():
    model = several()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def step() -> set[str]:
        model.zero_grad(set_to_none=True)
        compiled(**INPUTS).logits.sum().backward()
        return {n for n, p in model.named_parameters() if p.grad is not None}

    hf_lora.activate(model, "default")
    alone = step()
    with hf_lora.use_adapter(model, "second"):
        inside = step()
        outside: list[set[str]] = []
        thread = threading.Thread(target=lambda: outside.append(step()))
        thread.start()
        thread.join()
    assert inside
    assert all(name.endswith("_second") for name in inside)
    assert outside == [alone]
    assert step() == alone
    assert not any(name.endswith("_second") for name in alone)


def test_compiled_layers_that_run_again_do_what_their_forward_did():
    """Checkpointed from outside, so that PyTorch runs the compiled code twice."""

    def half_strength(model: Any) -> dict[str, torch.Tensor]:
        hf_lora.unfreeze(model, "second")
        with hf_lora.use_adapter(model, {"second": 0.5}):
            logits = model(**INPUTS).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    exact, found = half_strength(several().double().train()), []
    for how in (None, False, True):
        torch._dynamo.reset()
        model = several().train()
        if how is not None:
            kwargs = {"use_reentrant": how}
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        for layer in model.model.layers:
            layer.mlp.compile(backend="aot_eager", fullgraph=True)
        found.append(half_strength(model))
    for other in found[1:]:
        assert_rounded_alike((other, found[0], exact))
