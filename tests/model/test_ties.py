"""Weights that the base ties and an adapter trains in full: one tensor, whichever end is named."""

import copy
import dataclasses
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from hf_lora.model.registry import registry_of
from tests.model.models import llama
from tests.model.tied import (
    LLAMA,
    MODELS,
    Tied,
    base_weight,
    copies,
    each_end,
    each_model,
    is_one,
    weights,
)
from tests.oracle.adapting import scramble
from tests.snapshot import snapshot


def sgd(tied: Tied, model: nn.Module, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for _ in range(3):
        tied.logits(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@each_end
def test_it_trains_as_the_plain_models_tied_weight_does(tied: Tied, train: Sequence[str]):
    model, plain = tied.wrap(train), tied.build().requires_grad_(False)
    hf_lora.freeze(model, "default")
    (trains,) = [p for _, p in registry_of(model).parameters("default") if p.shape[0] in (24, 48)]
    trains.requires_grad_(True)
    weight = plain.get_submodule(tied.ends[0]).weight.requires_grad_(True)
    assert copies(model) == [trains]
    sgd(tied, model, [trains])
    sgd(tied, plain, [weight])
    assert is_one(weights(model, tied))
    assert torch.equal(trains, weight)
    assert torch.equal(tied.logits(model), tied.logits(plain))


@each_end
@torch.no_grad()
def test_the_base_keeps_its_tensor_and_its_tie(tied: Tied, train: Sequence[str]):
    model = tied.build()
    before, base = snapshot(model), tied.logits(model)
    tied.wrap(train, model)
    assert torch.equal(tied.logits(model), base)
    scramble(model)
    assert not torch.allclose(tied.logits(model), base)
    with hf_lora.no_adapter(model):
        assert is_one(weights(model, tied))
        assert torch.equal(tied.logits(model), base)
    hf_lora.unwrap(model)
    assert snapshot(model) == before
    assert is_one(weights(model, tied))


@each_end
def test_plan_and_summary_count_it_once_and_name_what_follows(tied: Tied, train: Sequence[str]):
    plan = hf_lora.plan(tied.build(), tied.target, r=2, train=train)
    first = next(end for end in tied.ends if end in train)
    rest = [end for end in tied.ends if end not in train]
    assert f"note: {first} is tied with " in str(plan)
    model = tied.wrap(train)
    trains = [p for p in model.parameters() if p.requires_grad]
    assert plan.parameters == sum(p.numel() for p in trains)
    assert plan.weight_bytes == plan.gradient_bytes == sum(p.numel() * 4 for p in trains)
    (found,) = hf_lora.summary(model).adapters
    assert (found.parameters, set(found.tied)) == (plan.parameters, set(rest))
    assert (f"tied with {', '.join(found.tied)}" in str(hf_lora.summary(model))) == bool(rest)
    groups = hf_lora.optimizer_groups(model, lr=0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, trains))


def test_the_words_of_the_plan():
    words = "model.embed_tokens is tied with lm_head: one tensor, which trains in all of them"
    for train in (["embed_tokens"], ["lm_head", "embed_tokens"]):
        assert hf_lora.plan(llama(tied=True), "q_proj", train=train).notes == (words,)
    plan = hf_lora.plan(llama(tied=True), "q_proj", train=["lm_head"])
    assert plan.notes[0].startswith("lm_head is tied with model.embed_tokens: ")
    assert not hf_lora.plan(llama(), "q_proj", train=["embed_tokens"]).notes


def test_shares_of_several_processes_count_it_once():
    plans = [
        hf_lora.plan(llama(tied=True), "q_proj", train=train, world=2)
        for train in (["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"])
    ]
    assert plans[0].per_rank == plans[1].per_rank == plans[2].per_rank
    assert plans[0].per_rank[0].gradients == plans[0].gradient_bytes


@each_model
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model_keep_the_tie(tied: Tied, again: Callable[[Any], Any]):
    model = tied.wrap(tied.ends[-1:])
    scramble(model)
    twin = again(model)
    assert is_one(weights(twin, tied))
    assert weights(twin, tied)[0] is not weights(model, tied)[0]
    assert torch.equal(tied.logits(twin), tied.logits(model))
    with torch.no_grad():
        copies(twin)[0].zero_()
    assert not torch.equal(tied.logits(twin), tied.logits(model))


@each_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_of_the_model_keeps_the_tie(tied: Tied, dtype: torch.dtype):
    model = tied.wrap(tied.ends[:1]).to(dtype)
    assert is_one(weights(model, tied))
    assert weights(model, tied)[0].dtype == dtype
    (trains,) = copies(model)
    tied.logits(model).float().square().mean().backward()
    assert trains.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_copy_in_32_bits_of_a_16_bit_base(dtype: torch.dtype):
    tied = dataclasses.replace(LLAMA, build=lambda: llama(tied=True, dtype=dtype))
    model, plain = tied.wrap(["lm_head"]), tied.build().requires_grad_(False)
    plain.lm_head.weight.requires_grad_(True)
    assert torch.equal(tied.logits(model), tied.logits(plain))
    for each in (model, plain):
        tied.logits(each).float().square().mean().backward()
    (trains,) = copies(model)
    assert trains.dtype == torch.float32
    # summed up in 32 bits here, in 16 there
    assert torch.allclose(trains.grad, plain.lm_head.weight.grad.float(), rtol=0.02, atol=1e-4)


TRANSFORMERS = [name for name in MODELS if name != "own"]


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("end", [0, -1])
def test_tie_weights_ties_the_bases_tensors_and_not_the_copies(name: str, end: int):
    """transformers calls it in many places; it reads one end's ``weight`` to set the other's."""
    tied = MODELS[name]
    model = tied.wrap([tied.ends[end]])
    scramble(model)
    before, expected = snapshot(model), tied.logits(model)
    model.tie_weights()
    assert snapshot(model) == before
    assert torch.equal(tied.logits(model), expected)
    hf_lora.merge(model)
    before = snapshot(model)
    model.tie_weights()
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])  # all of which is in the state dict
def test_weights_that_are_given_new_memory_are_tied_again(name: str):
    """What gives each name a tensor of its own calls ``tie_weights`` next."""
    tied = MODELS[name]
    model = tied.wrap(tied.ends[-1:])
    scramble(model)
    expected, values = tied.logits(model), copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(values, assign=True)
    assert not is_one(weights(model, tied))
    model.tie_weights()
    assert is_one(weights(model, tied))
    assert torch.equal(tied.logits(model), expected)
    with hf_lora.no_adapter(model):
        assert is_one(weights(model, tied))


@each_end
def test_a_merge_keeps_the_tie(tied: Tied, train: Sequence[str], tmp_path: Path):
    model = tied.wrap(train)
    scramble(model)
    before, expected = snapshot(model), tied.logits(model)
    hf_lora.merge(model)
    assert is_one(weights(model, tied))
    assert torch.allclose(tied.logits(model), expected, atol=1e-5)
    hf_lora.unmerge(model)
    assert snapshot(model) == before
    assert torch.equal(tied.logits(model), expected)
    hf_lora.merge_and_unwrap(model)
    assert is_one(weights(model, tied))
    if isinstance(model, hf.PreTrainedModel):
        assert model.config.tie_word_embeddings is True
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert is_one(weights(again, tied))
        assert torch.equal(tied.logits(again), tied.logits(model))


@each_model
def test_a_strength_at_use_is_one_mixture(tied: Tied):
    model = tied.wrap(tied.ends[:1])
    scramble(model)
    base, copied = (t.detach().clone() for t in (base_weight(model, tied), weights(model, tied)[0]))
    hf_lora.activate(model, {"default": 0.25})
    for weight in weights(model, tied):
        assert torch.allclose(weight, 0.75 * base + 0.25 * copied, atol=1e-6)
    expected = tied.logits(model)
    hf_lora.merge(model)
    assert is_one(weights(model, tied))
    assert torch.allclose(tied.logits(model), expected, atol=1e-5)
