"""Buffers that a training moves: the adapter's own, while the base keeps what it had."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import StateError
from hf_lora.model import buffers
from hf_lora.model.registry import registry_of
from tests.moving import Codebook, Ranged, Running, X, answer, around, spectral, train
from tests.snapshot import base_digests, snapshot

KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "in place and by another tensor": (Running, "fc"),
    "of a layer that is adapted": (lambda: Ranged(6, 6), "inner|fc"),
    "of an estimated spectral norm": (spectral, "fc"),
    "by a hook of the layer": (lambda: nn.utils.spectral_norm(nn.Linear(6, 6)), "fc"),
    "through .data, seen by no counter": (Codebook, "fc"),
}
EACH = pytest.mark.parametrize(("make", "targets"), KINDS.values(), ids=list(KINDS))


def moved(model: nn.Module, adapter: str = "default") -> set[str]:
    registry = registry_of(model)
    registry.settle_buffers()
    return {f"{path}.{role}" for path, _, role, _ in registry.held_buffers(adapter)}


@EACH
def test_the_base_keeps_its_values_and_the_adapter_has_its_own(
    make: Callable[[], nn.Module], targets: str
):
    model = around(make)
    before, base = snapshot(model.train()), base_digests(model)
    expected = answer(model)
    hf_lora.wrap(model, targets=targets, r=2)
    added = set(model.state_dict()) - set(before.keys)
    train(model)
    trained = answer(model)
    with hf_lora.no_adapter(model):
        assert torch.equal(answer(model), expected)
    assert torch.equal(answer(model), trained)
    assert moved(model)
    held = set(model.state_dict()) - set(before.keys) - added
    assert all("lora_copy_" in name for name in held)
    assert base_digests(model, added | held) == base
    hf_lora.unwrap(model)
    after = snapshot(model)
    assert (after.modules, after.parameters) == (before.modules, before.parameters)
    assert base_digests(model) == base


@EACH
def test_training_is_that_of_a_model_that_nobody_looks_at(
    make: Callable[[], nn.Module], targets: str
):
    """Switched in the middle, copied, and pickled, it goes on as if nothing had been."""
    watched = hf_lora.wrap(around(make), targets=targets, r=2)
    plain = copy.deepcopy(watched)
    for _ in range(3):
        train(watched, 1)
        with hf_lora.no_adapter(watched):
            watched(X)
        watched = copy.deepcopy(watched)
        if make is not spectral:  # which PyTorch forbids to pickle
            watched = pickle.loads(pickle.dumps(watched))
    train(plain, 3)
    assert torch.equal(answer(watched), answer(plain))
    names = moved(plain)
    assert moved(watched) == names
    for name in names:
        assert torch.equal(watched.get_buffer(name), plain.get_buffer(name))


def test_only_what_moved_and_is_part_of_the_result_becomes_the_adapters():
    model = hf_lora.wrap(around(Running, lambda: nn.BatchNorm1d(6)), "fc", r=2)
    train(model)
    assert moved(model) == {"inner.0.mean", "inner.0.steps"}
    assert model.inner[0].cache.equal(torch.full((2,), 3.0))
    still = hf_lora.wrap(around(Running, nn.Tanh), "fc", r=2)
    answer(still)
    assert not moved(still)
    assert type(still.inner[0]) is Running


def test_each_adapter_has_its_own_and_an_untrained_one_the_bases():
    model = hf_lora.wrap(around(Running), "fc", r=2)
    hf_lora.add_adapter(model, "b", "fc", r=2)
    train(model, 2)
    first = model.inner.mean.clone()
    hf_lora.activate(model, "b")
    assert torch.equal(model.inner.mean, torch.linspace(-1, 1, 6))
    train(model, 1)
    assert model.inner.steps == 1
    hf_lora.activate(model, "default")
    assert torch.equal(model.inner.mean, first)
    assert model.inner.steps == 2
    hf_lora.delete_adapter(model, "default")
    assert model.inner.steps == 0
    hf_lora.activate(model, "b")
    assert model.inner.steps == 1


def test_what_moves_while_no_adapter_trains_is_put_back():
    """As in the forward of a reference, which DPO computes in train mode without the adapter."""
    model = around(Running)
    base = base_digests(model)
    hf_lora.wrap(model, "fc", r=2)
    for times in range(2):
        with hf_lora.no_adapter(model):
            model.train()(X)
        with torch.inference_mode(), hf_lora.no_adapter(model):
            model.train()(X)
        assert model.inner.steps == times
        train(model, 1)
    frozen = hf_lora.wrap(around(Running), "fc", r=2)
    hf_lora.freeze(frozen, "default")
    frozen.train()(X)
    for each in (model, frozen):
        hf_lora.unwrap(each)
        assert base_digests(each) == base


def test_whoever_holds_the_very_tensor_goes_on_writing_what_is_read():
    model = around(Running)
    kept = model.inner.mean
    hf_lora.wrap(model, "fc", r=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: kept.add_(1))
    model.eval()
    for step in (1, 2, 3):
        model.train()
        model.inner.eval()
        model(X).sum().backward()
        optimizer.step()
        assert torch.equal(model.inner.mean, torch.linspace(-1, 1, 6) + step)
        with hf_lora.no_adapter(model):
            assert torch.equal(model.inner.mean, torch.linspace(-1, 1, 6))


def test_a_module_that_one_adapter_trains_in_full_moves_under_another_for_that_one():
    model = hf_lora.wrap(around(Running, lambda: nn.Linear(6, 6)), "fc", r=2, train=["inner"])
    hf_lora.add_adapter(model, "b", "fc", r=2)
    train(model, 1)
    hf_lora.activate(model, "b")
    train(model, 2)
    assert model.inner[0].steps == 2
    hf_lora.activate(model, "default")
    assert model.inner[0].steps == 1
    with hf_lora.no_adapter(model):
        assert model.inner[0].steps == 0
    assert moved(model) == set()
    assert moved(model, "b") == {"inner.0.mean", "inner.0.steps"}


@pytest.mark.parametrize("make", [Running, spectral])
def test_a_merge_holds_them_and_is_undone_to_the_byte(make: Callable[[], nn.Module]):
    model = hf_lora.wrap(around(make), "fc", r=2)
    train(model)
    y = answer(model)
    hf_lora.merge(model)
    assert torch.allclose(answer(model), y, atol=1e-6)
    hf_lora.unmerge(model)
    assert torch.equal(answer(model), y)
    hf_lora.merge_and_unwrap(model)
    assert torch.allclose(answer(model), y, atol=1e-6)
    assert list(model.state_dict()) == list(around(make).state_dict())


def test_half_of_an_adapter_is_half_way_and_two_are_a_mean_or_refused():
    model = hf_lora.wrap(around(Running), "fc", r=2)
    hf_lora.add_adapter(model, "b", "head", r=2)
    train(model, 1)
    a = model.inner.mean.clone()
    hf_lora.activate(model, "b")
    train(model, 2)
    b = model.inner.mean.clone()
    base = torch.linspace(-1, 1, 6)
    hf_lora.activate(model, {"b": 0.5})
    assert torch.allclose(model.inner.mean, (base + b) / 2, atol=1e-6)
    assert model.inner.steps == 2
    hf_lora.activate(model, {"default": 0.75, "b": 0.25})
    assert torch.allclose(model.inner.mean, 0.75 * a + 0.25 * b, atol=1e-6)
    with pytest.raises(StateError, match=r"inner\.mean: default, b"):
        hf_lora.activate(model, ["default", "b"])
    hf_lora.activate(model, {"default": 0.75, "b": 0.25})
    y = answer(model)
    hf_lora.merge(model)
    assert torch.allclose(answer(model), y, atol=1e-6)


def test_views_of_the_base_and_of_the_policy_stay_as_they_were():
    model = hf_lora.wrap(around(Running), "fc", r=2)
    early = hf_lora.base_view(model)
    expected = answer(early)
    train(model)
    late = hf_lora.base_view(model)
    for view in (early, late):
        assert torch.equal(answer(view), expected)
        assert type(view.inner) is Running


def test_a_state_dict_loads_into_a_model_that_was_wrapped_alike():
    model = hf_lora.wrap(around(Running), "fc", r=2)
    fresh = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    train(model)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(answer(fresh), answer(model))
    assert moved(fresh) == moved(model)
    with hf_lora.no_adapter(fresh):
        assert torch.equal(answer(fresh), answer(around(Running)))
    own = around(Running)
    own.load_state_dict(model.state_dict(), strict=False)
    assert own.inner.steps == 0
    model.load_state_dict(before)
    assert model.inner.steps == 0


def test_a_base_that_is_loaded_after_the_wrap_is_the_base():
    weights = around(Running).state_dict()
    with torch.device("meta"):
        model = hf_lora.wrap(around(Running), "fc", r=2)
    model.to_empty(device="cpu")
    model.load_state_dict(weights, strict=False)
    late = hf_lora.wrap(around(Running), "fc", r=2)
    with torch.no_grad():
        late.inner.mean.fill_(7.0)
    loaded = hf_lora.wrap(around(Running), "fc", r=2)
    loaded.load_state_dict(loaded.state_dict() | {"inner.mean": torch.full((6,), 7.0)})
    for each in (late, loaded):
        with hf_lora.no_adapter(each):
            assert each.inner.mean[0] == 7
        assert not moved(each)
    seven = torch.full((6,), 7.0)
    for each, mean in ((model, torch.linspace(-1, 1, 6)), (late, seven), (loaded, seven)):
        train(each, 1)
        with hf_lora.no_adapter(each):
            assert torch.equal(each.inner.mean, mean)


def test_a_compiled_loop_moves_the_adapters_own():
    model = around(Running)
    expected = answer(model)
    hf_lora.wrap(model, "fc", r=2)
    compiled = torch.compile(model, backend="eager")
    train(compiled, 2)
    assert moved(model) == {"inner.mean", "inner.steps"}
    train(compiled, 1)
    assert model.inner.steps == 3
    with hf_lora.no_adapter(model):
        assert torch.equal(answer(model), expected)


def test_the_plan_names_what_would_be_saved():
    plan = hf_lora.plan(around(Running, lambda: nn.BatchNorm1d(6)), "fc", r=2)
    assert plan.buffers == ("inner.0.mean", "inner.0.steps", "inner.0.table")
    line = "saved with the adapter if the training moves them: inner.0.mean and 2 more"
    assert line in str(plan).splitlines()


def test_a_quantized_layers_own_are_not_meant():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 6
            self.register_buffer("qweight", torch.zeros(6, 6, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.qweight.add_(1)  # as kernels that pack anew at their first call
            return x

    model = hf_lora.wrap(around(Packed), "fc", r=2)
    train(model)
    assert not moved(model)


def test_parts_that_are_called_alone_train_too():
    model = hf_lora.wrap(around(Codebook), "fc", r=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train().head(model.inner(model.fc(X))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert moved(model) == {"inner.code", "inner.count", "inner.begun"}


def test_no_step_pays_for_it(monkeypatch: pytest.MonkeyPatch):
    calls = []
    noted = buffers.note
    monkeypatch.setattr(buffers, "note", lambda *args: calls.append("note") or noted(*args))
    monkeypatch.setattr(buffers.Buffers, "settle", lambda *_: calls.append("settle"))
    model = hf_lora.wrap(around(Running), "fc", r=2)
    calls.clear()
    train(model, 5)
    assert calls == ["note"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_while_one_is_given_loses_none(monkeypatch: pytest.MonkeyPatch, when: str):
    hold = buffers.hold

    def interrupted(*args: Any) -> None:
        if when == "after":
            hold(*args)
        raise KeyboardInterrupt

    model = hf_lora.wrap(around(lambda: Ranged(6, 6)), "fc", r=2)
    train(model)
    y = answer(model)
    monkeypatch.setattr(buffers, "hold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf_lora.activate(model, "default")
    monkeypatch.undo()
    assert moved(model) == {"inner.largest"}
    assert torch.equal(answer(model), y)
    with hf_lora.no_adapter(model):
        assert torch.equal(answer(model), answer(around(lambda: Ranged(6, 6))))
