"""Biases of several adapters on one model: each has its own, and their changes add up."""

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lora
from tests.kinds.test_biases import BIASES, TARGETS, Net, answers, close, loud, wrapped


def both(bias: str = "all", lora_bias: bool = True) -> Any:
    model = hf_lora.wrap(Net(), TARGETS, r=2, bias=bias, lora_bias=lora_bias)
    hf_lora.add_adapter(model, "b", TARGETS, r=1, bias=bias, lora_bias=lora_bias)
    return loud(model)


@pytest.mark.parametrize("bias", BIASES)
def test_changes_add_up_at_strengths(bias: str):
    model = both(bias)
    hf_lora.activate(model, {"default": 0.5, "b": 2.0})
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))
    one, base = model.one, Net().one
    want = base(x)
    for name, end in (("default", ""), ("b", "_b")):
        a, b, on_b = (getattr(one, f"lora_{k}{end}") for k in ("A", "B", "bias"))
        s = one.lora_slots[name].scaling * {"default": 0.5, "b": 2.0}[name]
        want = want + s * (x @ a.t() @ b.t() + on_b)
        if bias != "none":
            weight = {"default": 0.5, "b": 2.0}[name]
            want = want + weight * (getattr(one, f"lora_copy_bias{end}") - base.bias)
    close(one(x), want)
    if bias == "all":
        norm, first = model.norm, Net().norm.bias
        change = 0.5 * (norm.lora_copy_bias - first) + 2.0 * (norm.lora_copy_bias_b - first)
        close(norm.bias, first + change)


def test_each_is_used_alone_and_saved_alone(tmp_path: Path):
    model = both()
    hf_lora.save(model, tmp_path)
    for name, folder in (("default", tmp_path), ("b", tmp_path / "b")):
        with hf_lora.use_adapter(model, name):
            assert torch.equal(answers(hf_lora.load(Net(), folder)), answers(model))
    want = answers(model)
    hf_lora.delete_adapter(model, "b")
    assert torch.equal(answers(model), want)
    assert not any(name.endswith("_b") for name, _ in model.named_parameters())


def test_merged_together_they_are_what_they_are_apart():
    model = hf_lora.wrap(Net(), ["one", "two"], r=2, bias="all", lora_bias=True)
    hf_lora.add_adapter(model, "b", ["one"], r=1, bias="lora_only")
    loud(model)
    hf_lora.activate(model, {"default": 0.5, "b": 2.0})
    want = answers(model)
    hf_lora.merge(model)
    close(answers(model), want)
    hf_lora.unmerge(model)
    assert torch.equal(answers(model), want)


def test_biases_are_merged_all_or_none():
    model = both("lora_only", lora_bias=False)
    hf_lora.activate(model, ["default", "b"])
    want = answers(model)
    with pytest.raises(hf_lora.StateError, match="some of them merged, and some not"):
        hf_lora.merge(model, "b")
    assert torch.equal(answers(model), want)


def test_another_may_replace_one(tmp_path: Path):
    hf_lora.save(wrapped(bias="all", lora_bias=True), tmp_path)
    model = wrapped(bias="lora_only")
    hf_lora.load(model, tmp_path, replace=True)
    assert torch.equal(answers(model), answers(hf_lora.load(Net(), tmp_path)))
    hf_lora.load(model, tmp_path, replace=True)
    assert torch.equal(answers(model), answers(hf_lora.load(Net(), tmp_path)))


def test_where_one_has_a_bias_the_other_has_no_layer():
    model = hf_lora.wrap(Net(), ["one"], r=2, bias="all")
    before = list(model.state_dict())
    with pytest.raises(hf_lora.TargetError, match="last is trained in full by another adapter, or"):
        hf_lora.add_adapter(model, "b", ["last"], r=2)
    model = hf_lora.wrap(Net(), ["last"], r=2)
    with pytest.raises(hf_lora.TargetError, match="the bias of last cannot be trained: another"):
        hf_lora.add_adapter(model, "b", ["one"], r=2, bias="all")
    assert "last.lora_copy_bias_b" not in before
