"""Merging for good: no second copy of the weights, nothing lost to a failure or an interruption."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.functional.low_rank import Product
from hf_lora.merging import for_good
from tests.model.models import TOKENS, llama
from tests.snapshot import snapshot
from tests.tiny import scramble


def adapted(**fields: Any) -> nn.Module:
    model = hf_lora.wrap(llama(tied=True), **{"targets": [".*_proj", "lm_head"], "r": 4} | fields)
    scramble(model)
    return model


def test_each_weight_is_freed_as_soon_as_its_merged_one_is_there(monkeypatch: pytest.MonkeyPatch):
    model = adapted(targets=[".*_proj"])
    olds = [weakref.ref(p) for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    alive = []
    add = for_good.plus_products

    def counted(weight: torch.Tensor, products: Sequence[Product]) -> torch.Tensor:
        alive.append(sum(old() is not None for old in olds))
        return add(weight, products)

    monkeypatch.setattr(for_good, "plus_products", counted)
    hf_lora.merge_and_unwrap(model)
    assert alive == list(range(len(olds), 0, -1))


def test_it_is_what_a_merge_that_can_be_undone_gives():
    one, other = adapted(bias="all", train=["norm"]), adapted(bias="all", train=["norm"])
    hf_lora.merge(one)
    for model in (one, other):
        hf_lora.merge_and_unwrap(model)
    assert not other.config.tie_word_embeddings
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 5, 14])
def test_what_interrupts_after_the_first_weight_waits_until_the_last(
    monkeypatch: pytest.MonkeyPatch, at: int, error: type[BaseException]
):
    twin, model = hf_lora.merge_and_unwrap(adapted()), adapted()
    add, count = for_good.plus_products, iter(range(1000))

    def failing(weight: torch.Tensor, products: Sequence[Product]) -> torch.Tensor:
        if next(count) == at:
            raise error("out of nowhere")
        return add(weight, products)

    monkeypatch.setattr(for_good, "plus_products", failing)
    with pytest.raises(error, match="out of nowhere"):
        hf_lora.merge_and_unwrap(model)
    assert type(model) is type(twin)
    assert model.state_dict().keys() == twin.state_dict().keys()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not model.config.tie_word_embeddings
    with pytest.raises(hf_lora.StateError, match="is not wrapped"):
        hf_lora.merge_and_unwrap(model)


def test_what_goes_on_failing_is_finished_by_the_next_call(monkeypatch: pytest.MonkeyPatch):
    twin, model = hf_lora.merge_and_unwrap(adapted()), adapted()

    def failing(weight: torch.Tensor, products: Sequence[Product]) -> torch.Tensor:
        raise MemoryError("full")

    monkeypatch.setattr(for_good, "plus_products", failing)
    with pytest.raises(MemoryError):
        hf_lora.merge_and_unwrap(model)
    monkeypatch.undo()
    with pytest.raises(hf_lora.StateError, match="is not wrapped"):
        hf_lora.merge_and_unwrap(model)
    assert torch.equal(model(TOKENS).logits, twin(TOKENS).logits)


@pytest.mark.parametrize("factor", [1e38, float("nan")])
def test_what_would_overflow_is_found_before_anything_changes(factor: float):
    model = adapted()
    last = model.model.layers[-1].mlp.down_proj
    with torch.no_grad():
        last.lora_B.fill_(factor)
        last.lora_A.fill_(100.0)
    before = snapshot(model)
    with pytest.raises(hf_lora.StateError, match=r"down_proj: .* merged values are not finite"):
        hf_lora.merge_and_unwrap(model)
    assert snapshot(model) == before


def test_a_sum_beyond_the_bound_that_is_finite_all_the_same_is_merged():
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).half()
    hf_lora.wrap(model, "0", r=2, alpha=2)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[60000.0, 0.0], [0.0, 0.0]]))
        model[0].lora_A.copy_(torch.tensor([[0.0, 0.0], [0.0, 30000.0]]))
        model[0].lora_B.copy_(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    hf_lora.merge_and_unwrap(model)
    assert model[0].weight.tolist() == [[60000.0, 0.0], [0.0, 30000.0]]


def test_too_little_memory_for_one_more_weight_is_found_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
):
    model, asked = adapted(), []
    before, largest = snapshot(model), model.model.layers[0].mlp.up_proj.weight.nbytes
    original = torch.empty

    def full(*sizes: Any, **fields: Any) -> torch.Tensor:
        if fields.get("dtype") is torch.uint8:
            asked.append(sizes)
            raise torch.OutOfMemoryError("full")
        return original(*sizes, **fields)

    monkeypatch.setattr(for_good.torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError):
        hf_lora.merge_and_unwrap(model)
    assert asked[0][0] >= 2 * largest
    assert snapshot(model) == before
