"""Merging is one rounding of the exact sum, and unmerging gives back the very bytes."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_lora
from hf_lora.model.registry import registry_of
from tests.model.models import TOKENS, Case, answer, each_floating_case, gpt2, llama
from tests.snapshot import snapshot
from tests.tiny import scramble

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]


def build(dtype: torch.dtype) -> nn.Module:
    """Return a tied Llama of one layer with two adapters that both reach the head."""
    model = llama(tied=True, layers=1).to(dtype)
    hf_lora.wrap(model, [".*_proj", "lm_head"], r=4, train=["norm"])
    hf_lora.add_adapter(model, "fr", ["q_proj", "lm_head", "up_proj"], r=2, alpha=5, rslora=True)
    scramble(model)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_cycles_change_no_byte(dtype: torch.dtype):
    """Nor do they replace a Parameter, whichever adapters are merged."""
    model = build(dtype)
    before = snapshot(model)
    choices = ("default", "fr", ["default", "fr"])
    merged = {}
    for cycle in range(1000):
        choice = choices[cycle % 3]
        hf_lora.merge(model, choice)
        weight = model.lm_head.weight.detach()
        first = merged.setdefault(str(choice), weight)
        assert torch.equal(weight, first)
        hf_lora.unmerge(model)
    assert snapshot(model) == before
    assert len({weight.sum().item() for weight in merged.values()}) == 3
    assert model.lm_head.weight is model.model.embed_tokens.weight


def ulps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return how many representable numbers lie between two 16-bit tensors, elementwise."""
    bits = [t.view(torch.int16).int() for t in (one, other)]
    ordered = [torch.where(b < 0, -(b & 0x7FFF), b) for b in bits]
    return (ordered[0] - ordered[1]).abs()


def spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return how far apart the numbers of a type lie around these values."""
    facts = torch.finfo(dtype)
    power = torch.floor(torch.log2(values.abs()))
    return facts.eps * (2.0**power).clamp_min(facts.tiny)


def exact(layer: nn.Module, names: list[str], *, sizes: bool = False) -> torch.Tensor:
    """Return the merged weight in float64, or the sum of the sizes of all that is added up."""
    take = torch.abs if sizes else torch.clone
    total = take(layer.weight.detach().double())
    for name in names:
        a, b = (take(factor.detach().double()) for factor in layer.lora_pair(name))
        update = layer.lora_slots[name].scaling * b @ a
        total = total + (update.T if isinstance(layer, Conv1D) else update)
    return total


@pytest.mark.parametrize("host", [nn.Linear, Conv1D], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]], ids=len)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_merged_weight_is_the_exact_sum_rounded_once(
    dtype: torch.dtype, names: list[str], host: type
):
    model = nn.Sequential(host(384, 320).to(dtype))
    hf_lora.wrap(model, "0", r=8, adapter="a")
    hf_lora.add_adapter(model, "b", "0", r=16, alpha=3)
    hf_lora.add_adapter(model, "c", "0", r=1, dtype="bfloat16")
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    before = model[0].weight.detach()
    total, size = exact(model[0], names), exact(model[0], names, sizes=True)
    expected = total.to(dtype)
    assert (expected != before).float().mean() > 0.9
    hf_lora.merge(model, names)
    merged = model[0].weight.detach()
    off = ulps(merged, expected)
    assert (off == 0).double().mean() > 0.999
    # where weight and updates cancel out, what is left may be as small as float32's own rounding
    cancelled = total.abs() < 2**-10 * size
    assert cancelled.double().mean() < 0.01
    assert off[~cancelled].max() <= 1
    error = (merged.double() - total).abs()
    assert (error <= 0.5001 * spacing(total, dtype) + 2**-19 * size).all()


def test_in_float32_and_float64_the_sum_is_exact_to_their_rounding():
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.float64, 1e-15)):
        model = nn.Sequential(nn.Linear(300, 200, dtype=dtype))
        hf_lora.wrap(model, "0", r=8)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        expected = exact(model[0], ["default"])
        hf_lora.merge(model)
        error = (model[0].weight.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance


@each_floating_case
def test_a_merged_model_answers_as_the_unmerged(case: Case):
    model = hf_lora.wrap(case.build(), **case.fields)
    scramble(model)
    off = 0.1 if next(model.parameters()).dtype == torch.bfloat16 else 1e-4
    adapted = answer(model, case)
    hf_lora.merge(model)
    assert torch.allclose(answer(model, case), adapted, rtol=off, atol=off)
    hf_lora.unmerge(model)
    assert torch.equal(answer(model, case), adapted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_merged_layer_is_as_near_to_the_exact_answer_as_the_unmerged(dtype: torch.dtype):
    model = nn.Sequential(nn.Linear(256, 256, dtype=dtype))
    hf_lora.wrap(model, "0", r=8)
    nn.init.normal_(model[0].lora_B, std=0.05)
    x = torch.randn(64, 256, dtype=dtype)
    expected = x.double() @ exact(model[0], ["default"]).T + model[0].bias.double()
    live = (model(x).double() - expected).norm() / expected.norm()
    hf_lora.merge(model)
    merged = (model(x).double() - expected).norm() / expected.norm()
    assert merged < 2 * live
    assert merged < torch.finfo(dtype).eps


def test_a_merge_never_changes_what_is_not_merged():
    model = build(torch.float32)
    hf_lora.activate(model, ["default", "fr"])
    with torch.no_grad():
        both = model(TOKENS).logits
        hf_lora.merge(model, "fr")  # default goes on being added live
        assert torch.allclose(model(TOKENS).logits, both, atol=2e-3, rtol=1e-3)
        hf_lora.unmerge(model)
        hf_lora.merge(model)
        assert torch.allclose(model(TOKENS).logits, both, atol=2e-3, rtol=1e-3)
        hf_lora.unmerge(model)
        assert torch.equal(model(TOKENS).logits, both)


def test_what_is_noted_on_a_parameter_goes_along():
    model = gpt2()
    hf_lora.wrap(model, "c_attn", r=4)
    scramble(model)
    layer = model.transformer.h[0].attn.c_attn
    layer.weight._is_hf_initialized = True
    layer.weight.note = "kept"
    hf_lora.merge(model)
    assert layer.weight.note == "kept"
    merged = layer.weight.clone()
    model.init_weights()
    assert torch.equal(layer.weight, merged)
    assert not layer.weight.requires_grad


def test_the_live_adapters_of_a_merged_model_train():
    model = build(torch.float32)
    hf_lora.merge(model, "default")
    hf_lora.freeze(model, "default")
    hf_lora.unmerge(model)
    hf_lora.activate(model, ["default", "fr"])
    hf_lora.merge(model, "default")
    model(TOKENS, labels=TOKENS).loss.backward()
    graded = {n for n, p in model.named_parameters() if p.grad is not None}
    registry = registry_of(model)
    assert graded == {name for name, _ in registry.parameters("fr")}
