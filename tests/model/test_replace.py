"""An adapter in the place of another: its values where they fit, else all of it, or nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lora
from hf_lora import StateError
from hf_lora.adapter_io import load
from hf_lora.kinds.lora import LoRALayer
from hf_lora.model.registry import registry_of
from tests.snapshot import snapshot
from tests.tiny import Net, answers, saved, scramble


def two() -> Net:
    model = hf_lora.wrap(Net(), ["q_proj", "v_proj"], adapter="a", r=2, alpha=4.0)
    hf_lora.add_adapter(model, "b", "q_proj", r=3)
    scramble(model)
    return model


def fresh(directory: Path) -> torch.Tensor:
    return answers(hf_lora.load(Net(), directory))


@pytest.mark.parametrize("alpha", [4.0, 9.0])
def test_values_that_fit_change_in_the_tensors_that_are_there(tmp_path: Path, alpha: float):
    saved(tmp_path, seed=9, alpha=alpha)
    model = two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    addresses = {name: p.data_ptr() for name, p in before.items()}
    hf_lora.load(model, tmp_path, adapter="a", replace=True, trainable=True)
    assert torch.equal(answers(model), fresh(tmp_path))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p and p.data_ptr() == addresses[name] for name, p in before.items())
    assert hf_lora.adapters(model)["a"].alpha == alpha
    assert hf_lora.active_adapters(model) == ("a",)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held and p.requires_grad for _, p in registry_of(model).parameters("a"))
    hf_lora.save(model, tmp_path / "again", adapter="a")
    assert torch.equal(fresh(tmp_path / "again" / "a"), fresh(tmp_path))


OTHERS: list[dict[str, Any]] = [
    {"r": 3},
    {"targets": ["q_proj"]},
    {"train": ["head"]},
    {"dtype": "bfloat16"},
]


@pytest.mark.parametrize("fields", OTHERS, ids=str)
def test_an_adapter_of_another_shape_takes_the_place_as_a_whole(tmp_path: Path, fields: dict):
    saved(tmp_path, seed=9, **fields)
    model = two()
    hf_lora.activate(model, {"b": 1.0, "a": 0.5})
    hf_lora.load(model, tmp_path, adapter="a", replace=True)
    assert list(hf_lora.adapters(model)) == ["a", "b"]
    assert registry_of(model).routing.now().chosen == (("b", 1.0), ("a", 0.5))
    hf_lora.activate(model, "a")
    assert torch.equal(answers(model), fresh(tmp_path))
    assert not any(p.requires_grad for _, p in registry_of(model).parameters("a"))
    plain = hf_lora.unwrap(model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in Net().modules()]
    assert plain.state_dict().keys() == Net().state_dict().keys()


def test_the_only_adapter_can_be_replaced(tmp_path: Path):
    saved(tmp_path, seed=9, r=5)
    model = hf_lora.wrap(Net(), "q_proj", r=2)
    with hf_lora.use_adapter(model, {"default": 1.0}):
        hf_lora.load(model, tmp_path, replace=True)
        assert torch.equal(answers(model), fresh(tmp_path))
    assert torch.equal(answers(model), fresh(tmp_path))
    other = hf_lora.load(Net(), tmp_path, replace=True)  # nothing is there to be replaced
    assert torch.equal(answers(other), fresh(tmp_path))


@pytest.mark.parametrize("fields", [{}, {"r": 3}, {"train": ["head"]}], ids=str)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_between_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type, fields: dict
):
    saved(tmp_path, seed=9, **fields)
    model = two()
    model.head.weight.note = "kept"
    hf_lora.add_adapter(model, "c", "v_proj", r=1, train=["head"])
    with hf_lora.use_adapter(model, "a"):
        before, logits, order = snapshot(model), answers(model), list(hf_lora.adapters(model))
        objects = dict(model.named_parameters())
        original, count = load.distribute_like, iter(range(1000))

        def failing(*args: Any) -> torch.Tensor:
            if next(count) == 2:
                raise error("out of nowhere")
            return original(*args)

        monkeypatch.setattr(load, "distribute_like", failing)
        with pytest.raises(error):
            hf_lora.load(model, tmp_path, adapter="a", replace=True)
        monkeypatch.undo()
        assert torch.equal(answers(model), logits)
    assert list(hf_lora.adapters(model)) == order
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in objects.items())
    assert {m[:2] for m in snapshot(model).modules} == {m[:2] for m in before.modules}
    assert torch.equal(answers(model), logits)


def test_what_cannot_be_replaced_now_says_so(tmp_path: Path):
    saved(tmp_path)
    model = two()
    with pytest.raises(StateError, match="replace=True"):
        hf_lora.load(model, tmp_path, adapter="a")
    with pytest.raises(StateError, match="replace=True"):
        hf_lora.add_adapter(model, "a", "q_proj")
    hf_lora.merge(model, "a")
    with pytest.raises(StateError, match="Cannot replace an adapter while a is merged"):
        hf_lora.load(model, tmp_path, adapter="a", replace=True)
    with pytest.raises(StateError, match="Cannot replace an adapter while a is merged"):
        hf_lora.add_adapter(model, "a", "q_proj", replace=True)
    hf_lora.load(model, tmp_path, adapter="b", replace=True)  # which is not merged


def test_an_adapter_that_clashes_with_one_in_use_does_not_come_in():
    model = hf_lora.wrap(Net(), "q_proj", adapter="a", r=2, train=["head"])
    hf_lora.add_adapter(model, "b", "v_proj", r=1)
    hf_lora.activate(model, ["a", "b"])
    with pytest.raises(StateError, match="cannot be added up"):
        hf_lora.add_adapter(model, "b", "v_proj", r=1, train=["head"], replace=True)
    assert hf_lora.adapters(model)["b"].train is None
    assert hf_lora.active_adapters(model) == ("a", "b")


def test_a_fresh_adapter_takes_the_place_of_one():
    model = two()
    hf_lora.add_adapter(model, "a", "v_proj", r=1, replace=True)
    assert list(hf_lora.adapters(model)) == ["a", "b"]
    assert hf_lora.active_adapters(model) == ("a",)
    assert torch.equal(answers(model), answers(Net()))  # B is zero
    layers = [m for m in model.modules() if isinstance(m, LoRALayer) and "a" in m.lora_slots]
    assert {tuple(m.lora_A_a.shape) for m in layers} == {(1, 8)}


def test_an_adapter_is_loaded_over_while_another_is_merged(tmp_path: Path):
    """Its base is compared with this base, and not with what is merged into it."""
    saved(tmp_path, seed=9)
    model = two()
    wanted = answers(hf_lora.load(two(), tmp_path, adapter="c"))
    hf_lora.merge(model, "a")
    hf_lora.load(model, tmp_path, adapter="c")
    assert torch.allclose(answers(model), wanted, atol=1e-5)
    hf_lora.activate(model, ["a", "c"])
    both = answers(model)
    hf_lora.merge(model, "c")
    assert torch.allclose(answers(model), both, atol=1e-5)
    hf_lora.unmerge(model)
    hf_lora.activate(model, "c")
    assert torch.equal(answers(model), fresh(tmp_path))


def test_a_module_that_holds_merged_values_is_no_start_for_another():
    model = hf_lora.wrap(Net(), "q_proj", adapter="a", r=2, train=["head"])
    scramble(model)
    hf_lora.merge(model)
    before = snapshot(model)
    with pytest.raises(hf_lora.TargetError, match="head holds merged values"):
        hf_lora.add_adapter(model, "b", "q_proj", r=2, train=["head"])
    assert snapshot(model) == before
