"""Ties beside other adapters, modules that share a part only, and what cannot follow."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import disk_offload
from safetensors.torch import load_model, save_model
from torch import nn

import hf_lora
from hf_lora import TargetError
from hf_lora.integrations.base_view import policy_view
from tests.files import edit
from tests.model.models import TOKENS, llama
from tests.model.tied import LLAMA, Tied, base_weight, bert, copies, each_model, is_one, weights
from tests.oracle.adapting import scramble
from tests.snapshot import snapshot


@each_model
def test_several_adapters_each_with_its_own(tied: Tied):
    model = tied.wrap(tied.ends[-1:])
    hf_lora.add_adapter(model, "same", tied.target, r=2, train=tied.ends[:1])
    hf_lora.add_adapter(model, "none", tied.target, r=2, train=())
    scramble(model)
    found = {}
    for name in ("default", "same", "none"):
        with hf_lora.use_adapter(model, name):
            assert is_one(weights(model, tied))
            found[name] = weights(model, tied)[0]
    assert found["none"] is base_weight(model, tied)
    assert found["default"] is not found["same"]
    with hf_lora.use_adapter(model, "same"):
        expected = tied.logits(model)
    hf_lora.delete_adapter(model, "default")
    hf_lora.activate(model, "same")
    assert torch.equal(tied.logits(model), expected)
    hf_lora.activate(model, "none")
    hf_lora.delete_adapter(model, "same")
    assert type(model.get_submodule(tied.ends[-1])) is type(
        tied.build().get_submodule(tied.ends[-1])
    )


def test_replacing_an_adapter_fails_back_to_the_very_tie():
    model = LLAMA.wrap(["lm_head"])
    scramble(model)
    before, expected = snapshot(model), LLAMA.logits(model)
    with pytest.raises(TargetError):
        hf_lora.add_adapter(model, "default", "no_such", r=2, replace=True)
    assert snapshot(model) == before
    hf_lora.add_adapter(model, "default", "q_proj", r=2, train=["embed_tokens"], replace=True)
    assert is_one(weights(model, LLAMA))
    assert not torch.equal(LLAMA.logits(model), expected)


def test_only_what_is_tied_follows():
    """A head's own bias is no part of the embeddings."""
    model, plain = bert(), bert()
    hf_lora.wrap(model, "query", r=2, train=["word_embeddings"])
    decoder = model.cls.predictions.decoder
    assert decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert decoder.weight.requires_grad
    assert not decoder.bias.requires_grad
    assert decoder.bias is model.cls.predictions.bias
    trains = [
        name for name, p in model.named_parameters() if p.requires_grad and "lora_A" not in name
    ]
    assert [name for name in trains if "lora_B" not in name] == [
        "bert.embeddings.word_embeddings.lora_copy_weight"
    ]
    scramble(model)
    plain.load_state_dict(hf_lora.merge_and_unwrap(copy.deepcopy(model)).state_dict())
    assert torch.allclose(plain(TOKENS).logits, model(TOKENS).logits, atol=1e-5)


def test_what_is_tied_inside_of_one_trained_module_stays_so():
    model = hf_lora.wrap(bert(), "query", r=2, train=["cls"])
    head = model.cls.predictions
    assert head.bias is head.decoder.bias
    assert head.decoder.weight is model.bert.embeddings.word_embeddings.weight
    (note,) = hf_lora.plan(bert(), "query", r=2, train=["cls"]).notes
    assert "cls.predictions.decoder is tied with bert.embeddings.word_embeddings" in note
    assert "predictions.bias" not in note


def test_a_fresh_head_that_is_tied_does_not_train_the_embeddings(tmp_path: Path):
    """Its weight was in the checkpoint, as that of the embeddings."""
    bert().bert.save_pretrained(tmp_path)
    model = hf.BertForMaskedLM.from_pretrained(tmp_path)
    plan = hf_lora.plan(model, "query", r=2)
    assert plan.fresh == ("cls.predictions.transform",)
    assert not plan.ties
    hf_lora.wrap(model, "query", r=2)
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    assert not model.cls.predictions.decoder.weight.requires_grad


def test_a_layer_that_is_tied_with_a_trained_one_gets_no_low_rank_update_beside():
    plan = hf_lora.plan(llama(tied=True), ["q_proj", "lm_head"], r=2, train=["embed_tokens"])
    reason = "tied with model.embed_tokens, which is trained in full"
    assert plan.left_out == {"lm_head": reason}
    assert not plan.problems
    with pytest.raises(TargetError, match=f"every matching layer is left out: lm_head .{reason}"):
        hf_lora.wrap(llama(tied=True), "lm_head", r=2, train=["embed_tokens"])
    model = LLAMA.wrap(["embed_tokens"])
    with pytest.raises(TargetError, match="lm_head is trained in full by another adapter"):
        hf_lora.add_adapter(model, "b", ["lm_head"], r=2)
    model = hf_lora.wrap(llama(tied=True), "lm_head", r=2)
    before = snapshot(model)
    words = "lm_head is tied with model.embed_tokens, and cannot follow it: it has a low-rank"
    with pytest.raises(TargetError, match=words):
        hf_lora.add_adapter(model, "b", "q_proj", r=2, train=["embed_tokens"])
    assert snapshot(model) == before


class AtTheTop(nn.Module):
    """A model whose own parameter is its embeddings'."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.body = nn.Linear(16, 16)
        self.out = self.embed.weight


def test_what_no_file_has_a_name_for_is_refused():
    model = AtTheTop()
    before = snapshot(model)
    words = "the model itself is tied with embed, and cannot follow it: no file has a name"
    with pytest.raises(TargetError, match=words):
        hf_lora.wrap(model, "body", r=2, train=["embed"])
    assert snapshot(model) == before


def test_the_tie_is_the_bases_also_while_another_adapter_has_loosened_it():
    model = hf_lora.wrap(llama(tied=True), "q_proj", r=2)
    hf_lora.add_adapter(model, "head", "lm_head", r=2)
    scramble(model)
    hf_lora.merge(model, "head")
    with pytest.raises(TargetError, match="lm_head"):
        hf_lora.add_adapter(model, "b", "q_proj", r=2, train=["embed_tokens"])


def test_untied_models_train_what_is_named():
    for train, other in (("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")):
        model = hf_lora.wrap(llama(), "q_proj", r=2, train=[train])
        assert not model.get_submodule(other).weight.requires_grad
        assert len(copies(model)) == 1


def test_a_bias_that_somebody_unfreezes_on_a_module_that_follows(tmp_path: Path):
    """Of such a module only the tied tensor is the adapter's; the rest is the base's."""
    model = hf_lora.wrap(bert(), "query", r=2, train=["word_embeddings"])
    model.cls.predictions.decoder.bias.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    hf_lora.save(model, tmp_path / "start")
    for step in ("first", "second"):
        model(TOKENS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        hf_lora.save(model, tmp_path / step)
        again = hf_lora.load(bert(), tmp_path / step)
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    decoder = model.cls.predictions.decoder
    assert decoder.weight is model.bert.embeddings.word_embeddings.weight
    hf_lora.unwrap(model)
    assert torch.equal(model(TOKENS).logits, bert()(TOKENS).logits)


def test_views_share_the_base_and_not_the_copy():
    model = LLAMA.wrap(["lm_head"])
    expected = llama(tied=True)(TOKENS % 24).logits
    scramble(model)
    view = hf_lora.base_view(model)
    assert torch.equal(view(TOKENS % 24).logits, expected)
    assert view.lm_head.weight is view.model.embed_tokens.weight
    assert view.lm_head.weight is base_weight(model, LLAMA)


def test_a_frozen_copy_of_the_policy_has_one_copy_too():
    """The reference of a trainer, where the adapter has been trained before."""
    model = LLAMA.wrap(["lm_head"])
    scramble(model)
    view = policy_view(model)
    assert torch.equal(LLAMA.logits(view), LLAMA.logits(model))
    assert is_one(weights(view, LLAMA))
    assert weights(view, LLAMA)[0] is not weights(model, LLAMA)[0]


def test_all_of_a_wrapped_model_in_a_file_that_holds_each_tensor_once(tmp_path: Path):
    model, other = LLAMA.wrap(["lm_head"]), LLAMA.wrap(["lm_head"])
    scramble(model)
    save_model(model, str(tmp_path / "all.safetensors"))
    load_model(other, str(tmp_path / "all.safetensors"))
    assert torch.equal(LLAMA.logits(other), LLAMA.logits(model))
    assert is_one(weights(other, LLAMA))


def test_a_mixture_of_one_that_is_tied_and_one_that_is_not(tmp_path: Path):
    model = LLAMA.wrap(["lm_head"])
    before = LLAMA.logits(model)
    scramble(model)
    hf_lora.save(model, tmp_path)
    edit.as_pefts(tmp_path, ensure_weight_tying=False)
    hf_lora.load(model, tmp_path, adapter="apart")
    with torch.no_grad():
        model.lm_head.lora_copy_weight_apart.add_(1)
    ends = weights(model, LLAMA)
    with hf_lora.use_adapter(model, "apart"):
        apart = weights(model, LLAMA)
    hf_lora.activate(model, {"default": 0.25, "apart": 0.75})
    for mixed, one, other in zip(weights(model, LLAMA), ends, apart, strict=True):
        assert torch.allclose(mixed, 0.25 * one + 0.75 * other, atol=1e-6)
    expected = LLAMA.logits(model)
    hf_lora.merge(model)
    assert model.config.tie_word_embeddings is False
    assert torch.allclose(LLAMA.logits(model), expected, atol=1e-5)
    hf_lora.unwrap(model)
    assert model.config.tie_word_embeddings is True
    assert is_one(weights(model, LLAMA))
    assert torch.equal(LLAMA.logits(model), before)


def test_replicas_of_the_model_read_one_copy():
    """As ``nn.DataParallel`` makes them: each parameter is a plain tensor there, by its index."""
    model = LLAMA.wrap(["lm_head"])
    scramble(model)
    plain = {id(p): p.detach().clone() for p in model.parameters()}
    replicas = []
    for end in LLAMA.ends:
        module = model.get_submodule(end)
        replicas.append(module._replicate_for_data_parallel())
        for name, parameter in module._parameters.items():
            setattr(replicas[-1], name, plain.get(id(parameter)))
    assert is_one([replica.weight for replica in replicas])
    assert torch.equal(replicas[0].weight, model.lm_head.weight)


def test_a_tied_base_that_accelerate_keeps_elsewhere(tmp_path: Path):
    expected = LLAMA.wrap(["lm_head"])
    scramble(expected)
    model = llama(tied=True)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    base = LLAMA.logits(model)
    LLAMA.wrap(["lm_head"], model)
    scramble(model)
    assert torch.equal(LLAMA.logits(model), LLAMA.logits(expected))
    assert len(copies(model)) == 1
    hf_lora.merge(model)
    assert torch.allclose(LLAMA.logits(model), LLAMA.logits(expected), atol=1e-5)
    hf_lora.unwrap(model)
    assert torch.equal(LLAMA.logits(model), base)
