"""Embeddings: only rows that are looked up are computed with; files, scales and merges right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

import hf_lora
from hf_lora.errors import AdapterMismatchError, TargetError
from hf_lora.files.safetensors_io import TensorFile

IDS = torch.tensor([[3, 5, 3, 9], [1, 2, 9, 9]])
SIZES: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **fields)).eval()


def gemma() -> Any:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)).eval()


MODELS = {"llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "gemma": gemma}


@torch.no_grad()
def loud(model: Any) -> Any:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_embedding_A" in name or "lora_B" in name:
            parameter.normal_(std=0.3)
    return model.eval()


def wrapped(make: Any = llama, targets: Any = ("embed_tokens", "q_proj"), **fields: Any) -> Any:
    return loud(hf_lora.wrap(make(), list(targets), **{"r": 4, **fields}))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("name", MODELS)
def test_its_rows_are_the_formula(name: str):
    model, base = wrapped(MODELS[name], ["embed_tokens"]), MODELS[name]()
    layer, plain = model.get_input_embeddings(), base.get_input_embeddings()
    assert isinstance(layer, type(plain))
    a, b = (factor.detach().double() for factor in layer.lora_pair("default"))
    scaling = hf_lora.plan(base, ["embed_tokens"], r=4).targets[0].slot.scaling
    table = plain.weight.detach().double() + scaling * (b @ a).t()
    scale = float(getattr(plain, "embed_scale", 1.0))
    torch.testing.assert_close(layer(IDS).double(), table[IDS] * scale, rtol=1e-5, atol=1e-5)
    fresh = hf_lora.wrap(MODELS[name](), ["embed_tokens"], r=4)
    assert torch.equal(logits(fresh), logits(base))


@pytest.mark.parametrize("name", MODELS)
def test_files_go_both_ways(name: str, tmp_path: Path):
    model = wrapped(MODELS[name])
    hf_lora.save(model, tmp_path / "ours")
    shapes = TensorFile(tmp_path / "ours" / "adapter_model.safetensors").shapes
    assert shapes["base_model.model.model.embed_tokens.lora_embedding_A"] == (4, 24)
    theirs = PeftModel.from_pretrained(MODELS[name](), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    config = LoraConfig(target_modules=["embed_tokens", "v_proj"], r=4, task_type="CAUSAL_LM")
    made = loud(get_peft_model(MODELS[name](), config))
    made.save_pretrained(str(tmp_path / "pefts"))
    with pytest.warns(hf_lora.HfLoRAWarning, match="only repeats the base's own weight"):
        again = hf_lora.load(MODELS[name](), tmp_path / "pefts").eval()
    torch.testing.assert_close(logits(again), logits(made), rtol=1e-5, atol=1e-5)


def test_only_rows_that_are_looked_up_get_a_gradient():
    model = wrapped(targets=["embed_tokens"])
    model(IDS, labels=IDS).loss.backward()
    gradient = model.model.embed_tokens.lora_embedding_A.grad
    assert {int(row) for row in gradient.abs().sum(0).nonzero()} == {*IDS.flatten().tolist()}
    assert model.model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("name", MODELS)
def test_merging_is_exact_and_undone(name: str):
    model = wrapped(MODELS[name])
    want, layer = logits(model), model.get_input_embeddings()
    weight = layer.weight
    hf_lora.merge(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    assert layer.weight is not weight
    hf_lora.unmerge(model)
    assert layer.weight is weight
    assert torch.equal(logits(model), want)
    plain = hf_lora.merge_and_unwrap(model)
    assert type(plain.get_input_embeddings()) is type(MODELS[name]().get_input_embeddings())
    torch.testing.assert_close(logits(plain), want, rtol=1e-4, atol=1e-4)


def test_a_tied_head_keeps_the_base_and_the_plan_says_so():
    model, base = wrapped(MODELS["tied"], ["embed_tokens"]), MODELS["tied"]()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    hidden = torch.randn(2, 16)
    assert torch.equal(model.lm_head(hidden), base.lm_head(hidden))
    assert "model.embed_tokens shares its weight with lm_head" in str(
        hf_lora.plan(base, ["embed_tokens"], r=4)
    )


def test_several_adapters_at_strengths_of_their_own():
    model = wrapped(targets=["embed_tokens"])
    hf_lora.add_adapter(model, "b", "embed_tokens", r=2)
    layer, base = model.model.embed_tokens, llama().model.embed_tokens
    with torch.no_grad():
        layer.lora_embedding_A_b.normal_()
    deltas = {name: layer.lora_delta(name)[IDS] for name in ("default", "b")}
    hf_lora.activate(model, {"default": 0.5, "b": 2.0})
    want = base(IDS) + 0.5 * deltas["default"] + 2.0 * deltas["b"]
    torch.testing.assert_close(layer(IDS), want, rtol=1e-5, atol=1e-5)
    hf_lora.delete_adapter(model, "b")
    assert not hasattr(layer, "lora_embedding_A_b")


def test_it_trains_and_is_saved_again_to_the_same_bytes(tmp_path: Path):
    model = hf_lora.wrap(llama(), ["embed_tokens"], r=4)
    optimizer = torch.optim.SGD(hf_lora.optimizer_groups(model, lr=0.1), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert model.model.embed_tokens.lora_embedding_A.any()
    hf_lora.save(model, tmp_path / "a")
    again = hf_lora.load(llama(), tmp_path / "a")
    assert torch.equal(logits(again), logits(model.eval()))
    hf_lora.save(again, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class Doubled(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Embedding(24, 16, max_norm=1.0), "renormalizes its rows in place"),
        (lambda: nn.Embedding(24, 16, sparse=True), "are sparse"),
        (lambda: Doubled(24, 16), "has a forward of its own"),
        (lambda: BartLearnedPositionalEmbedding(24, 16), "has a forward of its own"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(make: Any, words: str):
    model = llama()
    model.model.embed_tokens = make()
    with pytest.raises(TargetError, match=words):
        hf_lora.wrap(model, ["embed_tokens"], r=4)


def test_a_file_for_another_vocabulary_is_refused(tmp_path: Path):
    hf_lora.save(wrapped(targets=["embed_tokens"]), tmp_path)
    other = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 30}))
    with pytest.raises(AdapterMismatchError, match="for 24 rows of 16"):
        hf_lora.load(other, tmp_path, check_base=False)
