"""Buffers that a training moves, in files."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

import hf_lora
from hf_lora import AdapterFileError, AdapterMismatchError, HfLoRAWarning, SaveError
from hf_lora.layers import known_buffers
from tests.integrations.training import seeded
from tests.model.test_buffers import EACH, moved
from tests.moving import Running, answer, around, train
from tests.snapshot import base_digests

WEIGHTS = "adapter_model.safetensors"


def header(folder: Path) -> dict[str, Any]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return json.loads(file.metadata()["hf_lora"])


def trained(folder: Path, make: Callable[[], nn.Module], targets: str = "fc") -> nn.Module:
    model = hf_lora.wrap(around(make), targets, r=2)
    train(model)
    hf_lora.save(model, folder)
    return model


@EACH
def test_an_adapter_loads_with_them_here_and_in_peft(
    tmp_path: Path, make: Callable[[], nn.Module], targets: str
):
    model = trained(tmp_path, make, targets)
    expected = answer(model)
    names = moved(model)
    assert set(header(tmp_path)["buffers"]) == names
    assert header(tmp_path)["requires"] == ["buffers"]
    base = answer(around(make))
    loaded = hf_lora.load(around(make), tmp_path)
    assert torch.equal(answer(loaded), expected)
    assert moved(loaded) == names
    with hf_lora.no_adapter(loaded):
        assert torch.equal(answer(loaded), base)
    theirs = PeftModel.from_pretrained(around(make), tmp_path)
    torch.testing.assert_close(answer(theirs), expected, rtol=1e-5, atol=1e-6)
    hf_lora.save(loaded, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    hf_lora.unwrap(loaded)
    assert torch.equal(answer(loaded), base)


def test_peft_trains_a_model_whose_buffers_move_to_the_same_values(tmp_path: Path):
    start = hf_lora.wrap(around(Running), "fc", r=2)
    hf_lora.save(start, tmp_path)
    theirs = PeftModel.from_pretrained(around(Running), tmp_path, is_trainable=True)
    train(theirs)
    train(start)
    torch.testing.assert_close(start.inner.mean, theirs.base_model.model.inner.mean)
    torch.testing.assert_close(answer(start), answer(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    assert not [name for name in load_file(tmp_path / "theirs" / WEIGHTS) if "inner" in name]


def test_what_has_not_moved_is_not_in_the_file(tmp_path: Path):
    trained(tmp_path, Running)
    inner = [name for name in load_file(tmp_path / WEIGHTS) if "inner" in name]
    assert inner == ["base_model.model.inner.mean", "base_model.model.inner.steps"]
    model = hf_lora.wrap(around(Running), "fc", r=2)
    hf_lora.save(model, tmp_path / "fresh")
    assert (
        not {"buffers", *header(tmp_path / "fresh")["requires"]} & header(tmp_path / "fresh").keys()
    )


def test_several_adapters_load_each_with_its_own_and_one_takes_anothers_place(tmp_path: Path):
    first = answer(trained(tmp_path / "a", Running))
    model = hf_lora.wrap(around(Running), "fc", r=2)
    train(model, 1)
    second = answer(model)
    hf_lora.load(model, tmp_path / "a", adapter="a")
    assert torch.equal(answer(model), second)
    with hf_lora.use_adapter(model, "a"):
        assert torch.equal(answer(model), first)
    hf_lora.load(model, tmp_path / "a", replace=True)
    assert torch.equal(answer(model), first)
    plain = hf_lora.wrap(around(Running), "fc", r=2)
    hf_lora.save(plain, tmp_path / "plain")
    hf_lora.load(model, tmp_path / "plain", replace=True)
    assert torch.equal(answer(model), answer(plain))
    with hf_lora.use_adapter(model, "a"):
        assert torch.equal(answer(model), first)


def test_a_file_of_another_library_with_a_buffer_in_it_means_what_it_means_to_peft(tmp_path: Path):
    trained(tmp_path, Running)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.warns(HfLoRAWarning, match=r"inner\.mean is a buffer of the base"):
        loaded = hf_lora.load(around(Running), tmp_path)
    theirs = PeftModel.from_pretrained(around(Running), tmp_path)
    torch.testing.assert_close(answer(loaded), answer(theirs), rtol=1e-5, atol=1e-6)


def test_a_buffer_that_is_lost_or_does_not_fit_is_named(tmp_path: Path):
    trained(tmp_path, Running)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    metadata.pop("hf_lora_sha256")
    tensors = load_file(tmp_path / WEIGHTS)
    mean = tensors.pop("base_model.model.inner.mean")
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    with pytest.raises(AdapterFileError, match=r"inner\.mean has no tensor"):
        hf_lora.load(around(Running), tmp_path)
    save_file(
        {**tensors, "base_model.model.inner.mean": mean[:2].clone()}, tmp_path / WEIGHTS, metadata
    )
    model = around(Running)
    base = base_digests(model)
    with pytest.raises(AdapterMismatchError, match=r"inner\.mean: shape \(2,\), in the model \(6,"):
        hf_lora.load(model, tmp_path)
    assert base_digests(model) == base


class Growing(Running):
    """Keeps one number more for each step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table = torch.cat([self.table, self.table[-1:] + 1])
        return super().forward(x)


def test_what_a_file_cannot_hold_is_said_at_the_first_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = hf_lora.wrap(around(Growing), "fc", r=2)
    train(model)
    with pytest.warns(HfLoRAWarning, match=r"inner\.table: its shape is \(6,\) now, and \(3,\)"):
        hf_lora.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_lora.save(model, tmp_path)
    monkeypatch.setattr(known_buffers, "MOST_BYTES", 16)
    model = hf_lora.wrap(around(Running), "fc", r=2)
    train(model)
    with pytest.warns(HfLoRAWarning, match=r"inner\.mean: it is too large"):
        hf_lora.save(model, tmp_path)
    loaded = hf_lora.load(around(Running), tmp_path)  # it is no reason to take the base for another
    assert moved(loaded) == {"inner.steps"}


def test_an_observer_that_begins_at_infinity(tmp_path: Path):
    def make() -> nn.Module:
        return FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)

    model = hf_lora.wrap(around(make), "fc", r=2)
    train(model)
    assert {"inner.scale", "inner.activation_post_process.min_val"} <= moved(model)
    hf_lora.save(model, tmp_path)
    loaded, theirs = (
        hf_lora.load(around(make), tmp_path),
        PeftModel.from_pretrained(around(make), tmp_path),
    )
    for each in (loaded, theirs, model):
        for module in each.modules():
            if isinstance(module, FakeQuantize):
                module.disable_observer()  # it goes on in eval mode
    expected = answer(model)
    assert torch.equal(answer(loaded), expected)
    torch.testing.assert_close(answer(theirs), expected, rtol=1e-5, atol=1e-5)


def test_one_that_is_not_finite_is_not_saved(tmp_path: Path):
    model = hf_lora.wrap(around(Running), "fc", r=2)
    train(model, 1)
    moved(model)
    model.inner.mean.fill_(float("nan"))
    with pytest.raises(SaveError, match=r"inner\.mean"):
        hf_lora.save(model, tmp_path)


def test_ibert_keeps_the_ranges_that_its_training_has_measured(tmp_path: Path):
    """Its forward replaces them, and computes with them once it is quantized."""

    def make() -> Any:
        with seeded(8):
            return hf.IBertForSequenceClassification(
                hf.IBertConfig(
                    vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=24, max_position_embeddings=24, hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                )
            )  # fmt: skip

    ids = torch.arange(2, 10)[None]
    model = hf_lora.wrap(make(), r"classifier\.dense", r=2, train=()).train()
    before = make().eval()(ids).logits
    for _ in range(2):
        model(ids).logits.sum().backward()
    hf_lora.save(model, tmp_path)
    assert {name.rpartition(".")[2] for name in moved(model)} == {"x_min", "x_max"}
    loaded = hf_lora.load(make(), tmp_path)
    for name in moved(model):
        assert torch.equal(loaded.get_buffer(name), model.get_buffer(name))
    with hf_lora.no_adapter(model):
        assert torch.equal(model.eval()(ids).logits, before)
