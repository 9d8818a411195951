"""What differs between two adapters or two checkpoints, found without a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lora
from tests.algebra.zoo import deltas, saved
from tests.tiny_base import tiny_model


def test_an_adapter_is_the_same_as_itself(tmp_path: Path):
    one, other = (saved(tmp_path / name, 1, train=["head"]) for name in "ab")
    found = hf_lora.diff(one, other)
    assert found.equal
    assert "to the byte" in str(found)
    assert json.loads(found.to_json())["equal"] is True


def test_what_differs_in_adapters(tmp_path: Path):
    one = saved(tmp_path / "a", 1, ["linear", "conv", "attn"], train=["head"])
    other = saved(tmp_path / "b", 2, ["linear", "turned", "attn"], r=3, train=["head"])
    found = hf_lora.diff(one, other)
    assert found.config["r"] == (2, 3)
    assert found.only_in_one == ("conv",)
    assert found.only_in_other == ("turned",)
    there, here = deltas(one), deltas(other)
    layers = {each.name: each for each in found.compared}
    a, b = there["linear.weight"].flatten(), here["linear.weight"].flatten()
    assert layers["linear"].norms == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-6)
    assert layers["linear"].cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    assert layers["linear"].distance == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
    assert layers["head.weight"].kind == "tensor"
    assert not layers["head.weight"].equal
    text = str(found)
    assert "r: 2 -> 3" in text
    assert "only in one (1): 'conv'" in text


def test_another_factoring_of_one_update_is_no_distance_away(tmp_path: Path):
    one = saved(tmp_path / "a", 1, ["linear", "conv"], r=4)
    hf_lora.combine([one, one], [0.5, 0.5], "svd").save(tmp_path / "b")
    found = hf_lora.diff(one, tmp_path / "b")
    assert not found.equal
    for each in found.changed:
        assert each.distance == pytest.approx(0, abs=1e-6)
        assert each.cosine == pytest.approx(1)


def test_layers_of_other_sizes_are_told(tmp_path: Path):
    one = saved(tmp_path / "a", 1, ["linear"])
    other = saved(tmp_path / "b", 1, ["0"], lambda: torch.nn.Sequential(torch.nn.Linear(3, 4)))
    found = hf_lora.diff(one, other)
    assert (found.only_in_one, found.only_in_other) == (("linear",), ("0",))


def changed(folder: Path, change: Any, **how: Any) -> Path:
    model = tiny_model()
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder, **how)
    return folder


class TestCheckpoints:
    def test_the_same_in_other_files_is_the_same(self, tmp_path: Path):
        one = changed(tmp_path / "a", lambda model: None)
        other = changed(tmp_path / "b", lambda model: None, max_shard_size="40KB")
        assert hf_lora.diff(one, other).equal

    def test_what_differs(self, tmp_path: Path):
        def change(model: Any) -> None:
            model.model.norm.weight.mul_(2)
            model.config.rope_theta = 5.0

        one = changed(tmp_path / "a", lambda model: None)
        other = changed(tmp_path / "b", change, max_shard_size="40KB")
        found = hf_lora.diff(one, other)
        assert [each.name for each in found.changed] == ["model.norm.weight"]
        (norm,) = found.changed
        assert norm.cosine == pytest.approx(1)
        assert norm.distance == pytest.approx(1)
        assert found.kind == "checkpoints"

    def test_types_and_shapes(self, tmp_path: Path):
        one = changed(tmp_path / "a", lambda model: None)
        other = changed(tmp_path / "b", lambda model: model.resize_token_embeddings(402).bfloat16())
        found = {each.name: each for each in hf_lora.diff(one, other).compared}
        assert found["model.embed_tokens.weight"].distance is None
        assert "shape (400, 32) -> (402, 32)" in found["model.embed_tokens.weight"].what

    def test_a_block_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from hf_lora.algebra import diff as module

        one = changed(tmp_path / "a", lambda model: None)
        other = changed(tmp_path / "b", lambda model: model.lm_head.weight.add_(0.01))
        whole = hf_lora.diff(one, other).compared
        monkeypatch.setattr(module, "_BLOCK", 100)
        for there, here in zip(whole, hf_lora.diff(one, other).compared, strict=True):
            assert there.equal == here.equal
            assert there.distance == pytest.approx(here.distance)


def test_an_adapter_and_a_model_are_not_compared(tmp_path: Path):
    one = saved(tmp_path / "a", 1)
    other = changed(tmp_path / "b", lambda model: None)
    with pytest.raises(hf_lora.AdapterFileError, match="is an adapter and the other is a model"):
        hf_lora.diff(one, other)
