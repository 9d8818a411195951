"""Adapters at a strength of their own: half of one, 0.7 of one and 0.3 of another."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import hf_lora
from hf_lora import ConfigError, StateError
from hf_lora.model.registry import registry_of
from tests.snapshot import low_rank, snapshot
from tests.tiny import Net, answers, rows, scramble

WEIGHTS = [
    {"a": 0.5},
    {"a": 0.7, "b": 0.3},
    {"b": 0.25, "a": 1},
    {"a": -1.0},
    {"a": 2.0, "b": -0.5},
    {"a": 0.0, "b": 1.0},
    {"a": 0, "b": 0.0},
    {"a": np.float32(0.5)},
    {},
]


def two(**fields: Any) -> Net:
    """Return a model with an adapter on q and v and one of another rank on q."""
    model = hf_lora.wrap(Net(), ["q_proj", "v_proj"], adapter="a", r=2, alpha=4, **fields)
    hf_lora.add_adapter(model, "b", "q_proj", r=3, alpha=3)
    scramble(model)
    return model


def expected(model: Net, weights: Mapping[str, float]) -> torch.Tensor:
    """Return the answer of a plain model whose weights hold these shares, in float64."""
    plain = Net().double()
    registry = registry_of(model)
    for path, layer in low_rank(registry).items():
        weight = plain.get_submodule(path).weight
        for name, factor in weights.items():
            if name in layer.lora_slots:
                a, b = (part.detach().double() for part in layer.lora_pair(name))
                weight.data += float(factor) * layer.lora_slots[name].scaling * b @ a
    for path, module in registry.exclusive.items():
        for name, parameter in plain.get_submodule(path).named_parameters():
            change = sum(
                float(factor) * (module.lora_copy(a)[name].detach().double() - parameter.data)
                for a, factor in weights.items()
                if a in module.lora_copies
            )
            parameter.data += change
    return plain(rows().double()).detach()


def away(model: Net, wanted: torch.Tensor) -> float:
    return ((answers(model).double() - wanted).abs().max() / wanted.abs().max()).item()


# the plain model's own distance from float64, in float32
LIMIT = 1.5 * away(Net(), Net().double()(rows().double()).detach()) + 1e-6


def by_activate(model: Net, weights: Any) -> Net:
    return hf_lora.activate(model, weights)


def by_merge(model: Net, weights: Any) -> Net:
    hf_lora.activate(model, [])
    return hf_lora.merge(model, weights) if any(weights.values()) else model


def by_activate_and_merge(model: Net, weights: Any) -> Net:
    hf_lora.activate(model, weights)
    return hf_lora.merge(model) if any(weights.values()) else model


def by_merge_and_unwrap(model: Net, weights: Any) -> Net:
    hf_lora.activate(model, [])
    return hf_lora.merge_and_unwrap(model, weights) if any(weights.values()) else model


WAYS = [by_activate, by_merge, by_activate_and_merge, by_merge_and_unwrap]


@pytest.mark.parametrize("train", [(), ("head",)], ids=["low-rank", "head in full"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_verb_weighs(weights: dict, way: Callable, train: tuple[str, ...]):
    model = two(train=train)
    wanted = expected(model, weights)
    assert away(way(model, weights), wanted) < LIMIT


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_block_weighs_and_ends(weights: dict):
    model = two(train=["head"])
    before, wanted = answers(model), expected(model, weights)
    with hf_lora.use_adapter(model, weights):
        assert away(model, wanted) < LIMIT
        assert hf_lora.active_adapters(model) == tuple(n for n, w in weights.items() if w)
    assert torch.equal(answers(model), before)


def test_what_is_merged_with_a_factor_comes_out_byte_for_byte():
    model = two(train=["head"])
    before = snapshot(model)
    hf_lora.merge(model, {"a": 0.3})
    wanted = expected(model, {"a": 0.3, "b": 0.2})
    hf_lora.merge(model, {"b": 0.2})  # on top, from the base's own numbers
    assert registry_of(model).routing.standing.merged == (("a", 0.3), ("b", 0.2))
    assert away(model, wanted) < LIMIT
    hf_lora.unmerge(model)
    assert snapshot(model) == before


def test_merging_on_top_is_merging_at_once():
    """To the bit: both are one rounding of one sum."""
    one, other = (two(train=["head"]).to(torch.bfloat16) for _ in range(2))
    hf_lora.merge(hf_lora.merge(one, "a"), {"b": 0.5})
    hf_lora.merge(other, {"a": 1.0, "b": 0.5})
    for path, layer in low_rank(registry_of(one)).items():
        assert torch.equal(layer.weight, other.get_submodule(path).weight)
    assert len(registry_of(one).originals) == len(registry_of(other).originals)


def test_half_of_an_adapter_trains_as_one_of_half_the_alpha():
    """To the bit, and so do its gradients."""
    found = []
    for alpha, factor in ((8.0, 0.5), (4.0, 1.0)):
        model = hf_lora.wrap(Net(), ["q_proj", "v_proj"], r=2, alpha=alpha)
        scramble(model)
        hf_lora.activate(model, {"default": factor})
        model(rows()).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_a_share_of_a_module_in_full_trains_by_its_share():
    model = hf_lora.wrap(Net(), "q_proj", r=2, train=["head"])
    scramble(model)
    hf_lora.activate(model, {"default": 0.25})
    model(rows()).sum().backward()
    copy = model.head.lora_copy("default")["bias"]
    assert torch.allclose(copy.grad, torch.full_like(copy, 0.25 * len(rows())))
    read = model.head.bias
    base = Net().head.bias
    assert torch.allclose(read, base + 0.25 * (copy - base))


def test_a_mean_of_two_that_train_the_same_module_needs_no_base():
    """Where both have a fresh head, the base's own holds nothing that means anything."""
    model = hf_lora.wrap(Net(), "q_proj", adapter="a", r=2, train=["head"])
    hf_lora.add_adapter(model, "b", "q_proj", r=2, train=["head"])
    scramble(model)
    wanted = expected(model, {"a": 0.7, "b": 0.3})
    with torch.no_grad():
        model.head._parameters["weight"].fill_(torch.nan)
    with hf_lora.use_adapter(model, {"a": 0.7, "b": 0.3}):
        assert away(model, wanted) < LIMIT
    hf_lora.merge(hf_lora.activate(model, []), {"a": 0.7, "b": 0.3})
    assert away(model, wanted) < LIMIT
    hf_lora.unmerge(model)
    for names in (["a", "b"], {"a": 0.7, "b": 0.7}):
        with pytest.raises(StateError, match="cannot be added up") as caught:
            hf_lora.activate(model, names)
        assert "head: a, b" in str(caught.value)
    hf_lora.merge(model, "a")
    for factor in (1.0, 1e-3):
        with pytest.raises(StateError, match="cannot be added up"):
            hf_lora.merge(model, {"b": factor})


def test_of_a_fresh_head_there_is_no_half(tmp_path: Path):
    """The base's own is a draw of random numbers."""
    plain_llama().save_pretrained(tmp_path)
    base = LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    model = hf_lora.wrap(base, "q_proj", r=2).eval()
    scramble(model)
    tokens, head = torch.tensor([[1, 2, 3]]), model.score.lora_copy("default")["weight"]
    with hf_lora.use_adapter(model, {"default": 0.5}):
        assert torch.equal(model.score.weight, head)
        half = model(tokens).logits
    assert not torch.equal(half, model(tokens).logits)
    hf_lora.merge(model, {"default": 0.5})
    assert torch.equal(model.score.weight, head)
    assert torch.allclose(model(tokens).logits, half, atol=1e-4)
    hf_lora.unmerge(model)
    with pytest.raises(StateError, match="nothing to take it away from"):
        hf_lora.activate(model, {"default": -1.0})
    hf_lora.unwrap(model)
    assert "lora_fresh" not in vars(base.score)


def test_statistics_that_a_module_counts_are_no_mean():
    model = hf_lora.wrap(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "0", r=2, train=["1"])
    with pytest.raises(StateError, match="it counts in running_mean, running_var"):
        hf_lora.use_adapter(model, {"default": 0.5})
    hf_lora.activate(model, {"default": 1})


def test_an_adapter_of_no_strength_is_not_in_use_and_may_hold_anything():
    model = two()
    with torch.no_grad():
        for _, parameter in registry_of(model).parameters("b"):
            parameter.fill_(torch.nan)
    hf_lora.activate(model, {"a": 1.0, "b": 0.0})
    assert hf_lora.active_adapters(model) == ("a",)
    assert torch.equal(answers(model), answers(hf_lora.activate(model, "a")))
    with pytest.raises(StateError, match="nothing to merge"):
        hf_lora.merge(model, {"b": 0.0})


@pytest.mark.parametrize(
    "wrong", [float("nan"), float("inf"), True, "0.5", None, 1j, torch.tensor(0.5), [0.5]]
)
def test_a_factor_that_is_none_is_refused_before_anything_changes(wrong: object):
    model = two()
    before = answers(model)
    for verb in (
        hf_lora.activate,
        hf_lora.use_adapter,
        hf_lora.merge,
        hf_lora.merge_and_unwrap,
    ):
        with pytest.raises(ConfigError, match="weighed by a finite number") as caught:
            verb(model, {"a": 0.5, "b": wrong})  # type: ignore[operator]
        assert str(caught.value).count("\n") == 1
        with pytest.raises(hf_lora.UnknownAdapterError, match="no adapter 'c'"):
            verb(model, {"c": 0.5})  # type: ignore[operator]
    assert torch.equal(answers(model), before)


def test_verbs_that_do_not_weigh_refuse_factors():
    model = two()
    for verb in (hf_lora.freeze, hf_lora.unfreeze, hf_lora.delete_adapter):
        with pytest.raises(ConfigError, match="without factors"):
            verb(model, {"a": 0.5})  # type: ignore[arg-type]


def test_the_summary_and_the_layer_tell_the_strength():
    model = two()
    assert "times" not in str(hf_lora.summary(model))
    hf_lora.activate(model, {"a": 0.5})
    assert "a: active, times 0.5, training" in str(hf_lora.summary(model))
    assert [adapter.factor for adapter in hf_lora.summary(model).adapters] == [0.5, 1.0]
    assert model.layers[0].q_proj.scaling == 1.0  # half of alpha / r


def plain_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def llama() -> Any:
    return hf_lora.wrap(plain_llama(), "q_proj", r=2).eval()


def test_transformers_names_for_it_weigh_too():
    model = llama()
    model.set_adapter({"default": 0.5})
    model.disable_adapters()
    model.enable_adapters()
    assert registry_of(model).routing.now().live == (("default", 0.5),)


def test_an_adapter_for_each_row_is_refused_and_not_ignored():
    model, tokens = llama(), torch.tensor([[1, 2, 3]])
    with pytest.raises(ConfigError, match=r"use_adapter\(model, name\)"):
        model(input_ids=tokens, adapter_names=["default"])
    with pytest.raises(ValueError, match="adapter_names"):  # transformers' own
        model.generate(input_ids=tokens, adapter_names=["default"])


class Own(nn.Module):
    """A model whose own forward has an argument of that name, and one like diffusers' models."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Any, adapter_names: Any = None, attention_kwargs: Any = None) -> Any:
        return self.fc(x)


def test_an_argument_of_the_models_own_is_left_to_it():
    model = hf_lora.wrap(Own(), "fc", r=2)
    model(torch.ones(1, 4), adapter_names=["mine"], attention_kwargs={"scale": 1.0, "other": 2})
    with pytest.raises(ConfigError, match=r"\{'default': 0.5\}"):
        model(torch.ones(1, 4), attention_kwargs={"scale": 0.5})
