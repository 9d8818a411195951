"""Biases that adapters have trained are merged from file to file as they are in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import hf_lora

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}


@torch.no_grad()
def loud(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def answers(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    loud(BertForSequenceClassification(BertConfig(**SIZES))).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def wrapped(base: Path, **fields: Any) -> Any:
    model = BertForSequenceClassification.from_pretrained(base)
    return loud(hf_lora.wrap(model, ["query", "value"], r=2, train=(), **fields))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_they_are_what_they_are_in_memory(base: Path, tmp_path: Path, bias: str, weight: float):
    model = wrapped(base, bias=bias)
    hf_lora.save(model, tmp_path / "adapter")
    hf_lora.merge_checkpoint(base, {str(tmp_path / "adapter"): weight}, tmp_path / "out")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    hf_lora.activate(model, {"default": weight})
    torch.testing.assert_close(answers(merged), answers(model), rtol=1e-5, atol=1e-6)
    there = BertForSequenceClassification.from_pretrained(base)
    assert not torch.allclose(answers(merged), answers(there), atol=1e-3)
    own = dict(merged.named_parameters())
    for name, parameter in there.named_parameters():
        changed = ("query" in name or "value" in name) and "self" in name
        changed |= bias == "all" and name.endswith(".bias")
        assert torch.equal(own[name], parameter) is not changed, name


@pytest.mark.parametrize("fields", [{}, {"bias": "lora_only"}])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_one_on_b_is_put_into_the_layers_own(
    base: Path, tmp_path: Path, fields: dict[str, Any], weight: float
):
    model = wrapped(base, lora_bias=True, **fields)
    hf_lora.save(model, tmp_path / "adapter")
    hf_lora.merge_checkpoint(base, {str(tmp_path / "adapter"): weight}, tmp_path / "out")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    hf_lora.activate(model, {"default": weight})
    torch.testing.assert_close(answers(merged), answers(model), rtol=1e-5, atol=1e-6)


def test_those_of_several_adapters_are_added_up(base: Path, tmp_path: Path):
    model = wrapped(base, bias="lora_only")
    hf_lora.save(model, tmp_path / "a")
    hf_lora.save(loud(wrapped(base, bias="lora_only", lora_bias=True), 4), tmp_path / "b")
    hf_lora.load(model, tmp_path / "b", adapter="b")
    hf_lora.activate(model, {"default": 0.7, "b": 0.9})
    factors = {str(tmp_path / "a"): 0.7, str(tmp_path / "b"): 0.9}
    hf_lora.merge_checkpoint(base, factors, tmp_path / "out")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answers(merged), answers(model), rtol=1e-5, atol=1e-6)
