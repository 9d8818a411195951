"""Adapters from models that were fine-tuned in full: what changed comes back, and nothing else."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

import hf_lora
from hf_lora.file_merging.base import CheckpointBase
from tests.kinds import expert_models
from tests.tiny_base import tiny_model

IDS = torch.arange(12).view(2, 6)


def written(folder: Path, model: Any, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


@torch.no_grad()
def shifted(parameter: torch.Tensor, rank: int, seed: int, size: float = 0.1) -> None:
    """Add a product of a rank to a matrix, or to each of a stack."""
    drawn = torch.Generator().manual_seed(seed)
    *stack, out, wide = parameter.shape
    left = torch.randn(*stack, out, rank, generator=drawn)
    parameter += (size * left @ torch.randn(*stack, rank, wide, generator=drawn)).to(parameter)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def tuned(change: Callable[[Any], None], tmp_path: Path, **fields: Any) -> tuple[Path, Path, Any]:
    """Write a base and what a change makes of it; return both folders and the changed model."""
    base = written(tmp_path / "base", tiny_model(**fields))
    model = AutoModelForCausalLM.from_pretrained(base)
    change(model)
    return base, written(tmp_path / "tuned", model, max_shard_size="40KB"), model


def loaded(base: Path, folder: Path) -> Any:
    return hf_lora.from_pretrained(folder, base=str(base))


def test_a_change_of_low_rank_comes_back(tmp_path: Path):
    def change(model: Any) -> None:
        for i, layer in enumerate(model.model.layers):
            shifted(layer.self_attn.q_proj.weight, 3, i)
            shifted(layer.mlp.down_proj.weight, 2, 7 + i)

    base, there, model = tuned(change, tmp_path)
    made = hf_lora.extract(base, there, rank=4)
    assert {path.rpartition(".")[2] for path in made.layers} == {"q_proj", "down_proj"}
    assert made.error.total < 1e-5
    assert min(made.energy.values()) > 1 - 1e-9
    made.save(tmp_path / "adapter")
    assert_close(logits(loaded(base, tmp_path / "adapter")), logits(model))


def test_energy_finds_the_rank(tmp_path: Path):
    base, there, _ = tuned(
        lambda model: shifted(model.model.layers[0].self_attn.q_proj.weight, 3, 0), tmp_path
    )
    assert [slot.r for slot in hf_lora.extract(base, there, energy=0.999999).layers.values()] == [3]
    less = hf_lora.extract(base, there, energy=0.5)
    assert [slot.r for slot in less.layers.values()] in ([1], [2])
    assert all(energy >= 0.5 for energy in less.energy.values())


def test_what_is_no_matrix_is_kept_in_full(tmp_path: Path):
    @torch.no_grad()
    def change(model: Any) -> None:
        shifted(model.model.layers[0].self_attn.q_proj.weight, 1, 0)
        model.model.norm.weight += 0.25
        model.model.layers[1].input_layernorm.weight *= 1.5
        model.model.layers[0].self_attn.k_proj.bias += 0.5

    base, there, model = tuned(change, tmp_path, attention_bias=True)
    made = hf_lora.extract(base, there, rank=2)
    assert set(made.data.trained) == {"model.norm", "model.layers.1.input_layernorm"}
    assert made.layers["model.layers.0.self_attn.k_proj"].bias
    assert any("model.norm.weight is kept in full" in line for line in made.told)
    made.save(tmp_path / "adapter")
    assert_close(logits(loaded(base, tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("tie", [True, False])
def test_embeddings_and_heads_that_changed_are_kept_in_full(tmp_path: Path, tie: bool):
    @torch.no_grad()
    def change(model: Any) -> None:
        shifted(model.model.layers[0].self_attn.q_proj.weight, 1, 0)
        model.model.embed_tokens.weight[5] += 1
        if not tie:
            model.lm_head.weight[7] += 1

    base, there, model = tuned(change, tmp_path, tie_word_embeddings=tie)
    made = hf_lora.extract(base, there, rank=1)
    assert "model.embed_tokens" in made.data.trained
    made.save(tmp_path / "adapter")
    assert_close(logits(loaded(base, tmp_path / "adapter")), logits(model))


def test_tokens_that_were_added_come_along(tmp_path: Path):
    def change(model: Any) -> None:
        shifted(model.model.layers[0].self_attn.q_proj.weight, 1, 0)
        model.resize_token_embeddings(404)

    base, there, model = tuned(change, tmp_path)
    made = hf_lora.extract(base, there, rank=1)
    made.save(tmp_path / "adapter")
    assert_close(logits(loaded(base, tmp_path / "adapter")), logits(model))


def test_a_head_that_the_base_lacks_comes_along(tmp_path: Path):
    base = written(tmp_path / "base", tiny_model())
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    shifted(model.model.layers[0].self_attn.q_proj.weight, 1, 0)
    there = written(tmp_path / "tuned", model)
    made = hf_lora.extract(base, there, rank=1)
    assert made.data.trained == ("score",)
    assert any("the base does not have it" in line for line in made.told)
    made.save(tmp_path / "adapter")
    found = loaded(base, tmp_path / "adapter")
    found.config.pad_token_id = 0
    assert_close(logits(found), logits(model))


@pytest.mark.parametrize(
    "make", [expert_models.qwen3_moe, expert_models.gpt_oss, expert_models.llama4]
)
def test_stacks_of_experts(tmp_path: Path, make: Any):
    base = written(tmp_path / "base", expert_models.built(make))
    model = AutoModelForCausalLM.from_pretrained(base)
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            shifted(parameter.data, 2, len(name))
    there = written(tmp_path / "tuned", model)
    made = hf_lora.extract(base, there, rank=2)
    assert made.layers
    assert made.error.total < 1e-4
    made.save(tmp_path / "adapter")
    found = AutoModelForCausalLM.from_pretrained(base)
    hf_lora.load(found, tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-3, atol=1e-3)


def test_the_error_is_close_to_the_least_and_exact(tmp_path: Path):
    @torch.no_grad()
    def change(model: Any) -> None:
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter += 0.05 * torch.randn_like(parameter)

    base, there, model = tuned(change, tmp_path, hidden_size=96, intermediate_size=160)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    made = hf_lora.extract(base, there, rank=8)
    made.save(tmp_path / "adapter")
    found = loaded(base, tmp_path / "adapter")
    hf_lora.merge(found)
    after, merged = model.state_dict(), found.state_dict()
    for path in made.layers:
        name = f"{path}.weight"
        delta = (after[name] - before[name]).double()
        values = torch.linalg.svdvals(delta)
        least = float(values[8:].norm() / values.norm())
        lost = float((merged[name] - after[name]).double().norm() / delta.norm())
        assert made.error.layers[path] == pytest.approx(lost, rel=1e-3)
        assert least * (1 - 1e-6) <= made.error.layers[path] <= least * 1.001


def test_sixteen_bits_and_conv1d(tmp_path: Path):
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=48))
    base = written(tmp_path / "base", model.bfloat16())
    shifted(model.transformer.h[0].attn.c_attn.weight, 2, 0, 1.0)
    there = written(tmp_path / "tuned", model)
    made = hf_lora.extract(base, there, rank=3)
    (path,) = made.layers
    assert path.endswith("c_attn")
    assert made.data.fan_in_fan_out
    assert {t.dtype for t in made.data.tensors.values()} == {torch.bfloat16}
    assert 1e-4 < made.error.total < 2e-2
    made.save(tmp_path / "adapter")
    found = loaded(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(model), rtol=0.1, atol=0.1)


def test_the_right_base_is_known_by_its_fingerprint(tmp_path: Path):
    base, there, _ = tuned(
        lambda model: shifted(model.model.layers[0].self_attn.q_proj.weight, 1, 0), tmp_path
    )
    hf_lora.extract(base, there, rank=1).save(tmp_path / "adapter")
    with pytest.raises(hf_lora.BaseMismatchError):
        hf_lora.load(tiny_model(seed=1), tmp_path / "adapter")


class TestRefusals:
    def test_what_is_not_said(self, tmp_path: Path):
        with pytest.raises(hf_lora.ConfigError, match="rank=32"):
            hf_lora.extract(tmp_path, tmp_path)
        with pytest.raises(hf_lora.ConfigError, match="energy"):
            hf_lora.extract(tmp_path, tmp_path, energy=2.0)

    def test_the_same_model(self, tmp_path: Path):
        base = written(tmp_path / "base", tiny_model())
        with pytest.raises(hf_lora.TargetError, match="differ in nothing"):
            hf_lora.extract(base, base, rank=2)

    def test_another_architecture(self, tmp_path: Path):
        base = written(tmp_path / "base", expert_models.mixtral())
        there = written(tmp_path / "tuned", tiny_model(num_hidden_layers=1))
        with pytest.raises(hf_lora.BaseLoadError, match=r"mixtral .* a llama"):
            hf_lora.extract(base, there, rank=2)

    def test_no_checkpoint(self, tmp_path: Path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(hf_lora.BaseLoadError, match=r"config\.json"):
            hf_lora.extract(tmp_path / "empty", tmp_path / "empty", rank=2)


def test_of_the_model_one_tensor_of_each_side_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def change(model: Any) -> None:
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                shifted(parameter.data, 1, 0)

    base, there, _ = tuned(change, tmp_path, num_hidden_layers=6)
    alive: list[weakref.ref] = []
    counts = []
    read = CheckpointBase.read

    def counted(self: CheckpointBase, name: str) -> torch.Tensor | None:
        found = read(self, name)
        if found is not None and found.dim() == 2:
            alive.append(weakref.ref(found))
        counts.append(sum(each() is not None for each in alive))
        return found

    monkeypatch.setattr(CheckpointBase, "read", counted)
    hf_lora.extract(base, there, rank=1)
    assert len(counts) > 50
    assert max(counts) <= 4
