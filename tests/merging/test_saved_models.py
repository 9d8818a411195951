"""Merged for good: a plain model that saves in full, loads anywhere, and answers equally."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from tests.model.models import CASES, TOKENS, Case, answer, classifier, each_floating_case, llama
from tests.rounding import assert_rounded_alike
from tests.snapshot import snapshot
from tests.tiny import scramble

KEPT = {name: case for name, case in CASES.items() if isinstance(case.build(), hf.PreTrainedModel)}


@each_floating_case
def test_it_is_a_plain_model_of_the_same_shape(case: Case):
    plain = case.build()
    model = hf_lora.wrap(case.build(), **case.fields)
    scramble(model)
    adapted = answer(model, case)
    assert hf_lora.merge_and_unwrap(model) is model
    off = 0.1 if next(model.parameters()).dtype == torch.bfloat16 else 1e-4
    assert torch.allclose(answer(model, case), adapted, rtol=off, atol=off)
    assert [(path, type(m)) for path, m in model.named_modules()] == [
        (path, type(m)) for path, m in plain.named_modules()
    ]
    assert list(model.state_dict()) == list(plain.state_dict())
    flags = {name: p.requires_grad for name, p in plain.named_parameters()}
    now = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: now[name] for name in flags} == flags  # an untied head comes on top
    # what refuses to save it into an adapter's folder
    kept = {"save_pretrained"} if isinstance(model, hf.PreTrainedModel) else set()
    assert vars(model).keys() == vars(plain).keys() | kept
    with pytest.raises(hf_lora.StateError, match="not wrapped"):
        hf_lora.adapters(model)


@pytest.mark.parametrize("case", KEPT.values(), ids=KEPT.keys())
def test_it_saves_in_full_and_loads_with_equal_outputs(case: Case, tmp_path: Path):
    model = hf_lora.wrap(case.build(), **case.fields)
    scramble(model)
    hf_lora.merge_and_unwrap(model)
    merged = answer(model, case)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").is_file()
    assert not (tmp_path / "adapter_config.json").exists()
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info["missing_keys"])
    assert not any(info["unexpected_keys"])
    assert torch.equal(answer(again.eval(), case), merged)


def test_a_tied_head_is_untied_and_stays_so(tmp_path: Path):
    model = llama(tied=True)
    embedding = model.model.embed_tokens.weight.detach().clone()
    hf_lora.wrap(model, "lm_head", r=4)
    scramble(model)
    adapted, exact = model(TOKENS).logits, copy.deepcopy(model).double()(TOKENS).logits
    hf_lora.merge(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()  # as transformers does on its own; it must not undo the merge
    assert_rounded_alike((model(TOKENS).logits, adapted, exact))
    hf_lora.merge_and_unwrap(model)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings is False
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(again.model.embed_tokens.weight, embedding)


def test_a_tied_head_that_is_not_touched_stays_tied(tmp_path: Path):
    model = hf_lora.wrap(llama(tied=True), "q_proj", r=4)
    scramble(model)
    hf_lora.merge_and_unwrap(model)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_merged_model_saves_its_adapter_and_not_the_merged_weights(tmp_path: Path):
    model = hf_lora.wrap(classifier(), ["query"], r=4, train=["classifier"])
    scramble(model)
    hf_lora.save(model, tmp_path / "before")
    hf_lora.merge(model)
    hf_lora.save(model, tmp_path / "merged")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (
            tmp_path / "merged" / name
        ).read_bytes()


def test_only_what_was_merged_before_is_kept_for_good():
    model = hf_lora.wrap(llama(), "q_proj", r=4, adapter="a")
    hf_lora.add_adapter(model, "b", "v_proj", r=4)
    scramble(model)
    with hf_lora.use_adapter(model, "b"):
        expected = model(TOKENS).logits
    v = model.model.layers[0].self_attn.q_proj.weight
    hf_lora.merge(model, "b")
    hf_lora.merge_and_unwrap(model)
    assert torch.allclose(model(TOKENS).logits, expected, atol=1e-4)
    assert model.model.layers[0].self_attn.q_proj.weight is v


def test_the_copy_of_a_wrapped_model_merges_without_the_original():
    model = hf_lora.wrap(llama(), "q_proj", r=4)
    scramble(model)
    before = snapshot(model)
    twin = hf_lora.merge_and_unwrap(copy.deepcopy(model))
    assert type(twin.model.layers[0].self_attn.q_proj) is nn.Linear
    assert snapshot(model) == before
    assert torch.allclose(twin(TOKENS).logits, model(TOKENS).logits, atol=1e-4)
