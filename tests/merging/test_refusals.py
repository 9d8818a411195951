"""When a merge is refused, or fails in the middle: one error, and the model as it was."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import HfLoRAError, StateError
from hf_lora.functional.low_rank import Product
from hf_lora.layers import merge as layers_merge
from hf_lora.model.registry import registry_of
from tests.model.models import TOKENS, llama
from tests.snapshot import low_rank, snapshot
from tests.tiny import Net, answers, rows, scramble


def adapted(**fields: object) -> nn.Module:
    model = hf_lora.wrap(llama(tied=True), **{"targets": [".*_proj", "lm_head"], "r": 4} | fields)
    scramble(model)
    return model


def unchanged(model: nn.Module, verb: Callable[[], object], error: type, words: str) -> None:
    """Check that ``verb`` raises and leaves no trace."""
    before, logits = snapshot(model), model(TOKENS).logits.detach()
    tied = model.config.tie_word_embeddings
    with pytest.raises(error, match=words) as caught:
        verb()
    assert isinstance(caught.value, HfLoRAError) or error is KeyboardInterrupt
    assert snapshot(model) == before
    assert model.config.tie_word_embeddings is tied
    assert torch.equal(model(TOKENS).logits, logits)
    assert not registry_of(model).originals


def test_merging_what_is_merged_is_refused():
    model = adapted()
    hf_lora.add_adapter(model, "fr", "q_proj", r=2)
    hf_lora.merge(model)
    for names in (None, "default", ["fr", "default"], {"default": 0.5}):
        unchanged_merged = snapshot(model)
        with pytest.raises(StateError, match="merge again while default is merged"):
            hf_lora.merge(model, names)
        assert snapshot(model) == unchanged_merged
    hf_lora.unmerge(model)
    with pytest.raises(StateError, match="not merged"):
        hf_lora.unmerge(model)


def test_nothing_to_merge_is_said():
    model = adapted()
    hf_lora.activate(model, [])
    unchanged(model, lambda: hf_lora.merge(model), StateError, "nothing to merge")
    unchanged(model, lambda: hf_lora.merge(model, []), StateError, "nothing to merge")
    unchanged(model, lambda: hf_lora.merge_and_unwrap(model), StateError, "nothing to merge")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 7, -1])
def test_an_update_that_is_not_finite_breaks_nothing(value: float, at: int):
    """Whichever layer it is on: the ones before it were merged already, and come back."""
    model = adapted(train=["norm"])
    layers = list(low_rank(registry_of(model)).items())
    path, layer = layers[at]
    with torch.no_grad():
        layer.lora_B[0, 0] = value
    before = snapshot(model)
    with pytest.raises(StateError) as caught:
        hf_lora.merge(model)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(f"  - {path}: ")
    assert "merged values are not finite in torch.float32" in lines[1]
    assert snapshot(model) == before
    assert model.config.tie_word_embeddings
    with torch.no_grad():
        layer.lora_B[0, 0] = 0.0
    hf_lora.merge(model)
    hf_lora.unmerge(model)


def test_a_sum_that_half_precision_cannot_hold_is_refused():
    model = nn.Sequential(
        nn.Linear(4, 4, dtype=torch.float16), nn.Linear(4, 4, dtype=torch.float16)
    )
    hf_lora.wrap(model, ".*", r=2)
    with torch.no_grad():
        for layer in model:
            layer.lora_A.fill_(100.0)
            layer.lora_B.fill_(100.0)
    before = snapshot(model)
    with pytest.raises(StateError) as caught:
        hf_lora.merge(model)
    assert str(caught.value).count("16 merged values are not finite in torch.float16") == 2
    assert snapshot(model) == before


def test_a_base_that_is_not_finite_already_is_the_users_own_affair():
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[1, 2] = float("inf")
    hf_lora.wrap(model, "0", r=2)
    scramble(model)
    hf_lora.merge(model)
    assert torch.isinf(model[0].weight).sum() == 1
    hf_lora.unmerge(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [0, 5, 14])
def test_an_interruption_at_any_layer_is_undone(
    monkeypatch: pytest.MonkeyPatch, at: int, error: type[BaseException]
):
    model = adapted()
    before, logits = snapshot(model), model(TOKENS).logits
    original, count = layers_merge.plus_products, iter(range(1000))

    def failing(weight: torch.Tensor, products: Sequence[Product]) -> torch.Tensor:
        if next(count) == at:
            raise error("out of nowhere")
        return original(weight, products)

    monkeypatch.setattr(layers_merge, "plus_products", failing)
    with pytest.raises(error):
        hf_lora.merge(model)
    monkeypatch.undo()
    assert snapshot(model) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(TOKENS).logits, logits)
    hf_lora.merge(model)


def test_moved_and_cast_while_merged_the_base_follows():
    """What comes back is what casting the unmerged base would have given, in the same objects."""
    for dtype in (torch.bfloat16, torch.float64):
        model = hf_lora.wrap(Net(), ["q_proj"], r=2)
        scramble(model)
        weights = [layer.q_proj.weight for layer in model.layers]
        hf_lora.merge(model)
        model.to(dtype)
        hf_lora.unmerge(model)
        expected = Net().to(dtype)
        for layer, plain, weight in zip(model.layers, expected.layers, weights, strict=True):
            assert layer.q_proj.weight is weight
            assert torch.equal(weight, plain.q_proj.weight)
        with hf_lora.no_adapter(model):
            assert torch.equal(model(rows().to(dtype)), expected(rows().to(dtype)))


def test_no_adapter_is_refused_while_the_weights_say_otherwise():
    model = hf_lora.wrap(Net(), "q_proj", r=2)
    scramble(model)
    hf_lora.merge(model)
    merged = answers(model)
    with pytest.raises(StateError, match=r"call hf_lora\.unmerge\(model\) first"):
        hf_lora.no_adapter(model)
    assert torch.equal(answers(model), merged)


def test_trained_modules_are_merged_and_come_back():
    model = adapted(targets=["q_proj"], train=["norm", "embed_tokens"])
    before, logits = snapshot(model), model(TOKENS).logits
    hf_lora.merge(model)
    assert torch.allclose(model(TOKENS).logits, logits, atol=1e-4)
    assert model.config.tie_word_embeddings
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    assert model.model.norm._parameters["weight"] is not None
    hf_lora.unmerge(model)
    assert snapshot(model) == before
    assert model.config.tie_word_embeddings
    assert torch.equal(model(TOKENS).logits, logits)
    # training on while merged does not reach into the merged weights
    hf_lora.merge(model)
    with torch.no_grad():
        model.model.norm.lora_copy_weight.zero_()
    assert torch.allclose(model(TOKENS).logits, logits, atol=1e-4)
