"""How much alike two adapters are, against dense updates."""

import json
from pathlib import Path

import pytest
import torch

import hf_lora
from tests.algebra.zoo import deltas, saved


def test_it_is_the_cosine_of_the_dense_updates(tmp_path: Path):
    one = saved(tmp_path / "a", 1, ["linear", "turned", "conv", "embed", "attn"])
    other = saved(tmp_path / "b", 2, ["linear", "conv", "attn", "embed"], r=4, rslora=True)
    found = hf_lora.similarity(one, other)
    there, here = deltas(one), deltas(other)
    product = squares = others = 0.0
    for name in there:
        path = name.rpartition(".")[0]
        a = there[name].flatten()
        b = here.get(name, torch.zeros(1, dtype=torch.float64).expand_as(there[name])).flatten()
        product += float(a @ b)
        squares, others = squares + float(a @ a), others + float(b @ b)
        layer = found.layers[path]
        assert layer.norms[0] == pytest.approx(float(a.norm()), rel=1e-6)
        assert layer.norms[1] == pytest.approx(float(b.norm()), rel=1e-6, abs=1e-9)
        cosine = float(a @ b / a.norm() / b.norm()) if b.any() else 0.0
        assert layer.cosine == pytest.approx(cosine, abs=1e-6)
    assert found.total == pytest.approx(product / (squares * others) ** 0.5, abs=1e-6)
    assert json.loads(found.to_json())["total"] == found.total


def test_an_adapter_is_like_itself_and_unlike_its_opposite(tmp_path: Path):
    folder = saved(tmp_path / "a", 1)
    hf_lora.combine([folder], [-0.5]).save(tmp_path / "less")
    assert hf_lora.similarity(folder, folder).total == pytest.approx(1)
    assert hf_lora.similarity(folder, tmp_path / "less").total == pytest.approx(-1)
    assert "-1.000" in str(hf_lora.similarity(folder, tmp_path / "less"))
