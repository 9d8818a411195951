"""The summary: what is there, from the live tensors, against a dense oracle."""

import pytest
import torch

import hf_lora
from hf_lora.functional.low_rank import update_norm
from hf_lora.model.registry import registry_of
from tests.model.models import CASES, Case, each_case
from tests.snapshot import low_rank
from tests.tiny import Net, scramble


@each_case
def test_counts_bytes_and_norms_are_those_of_the_tensors(case: Case):
    base = sum(p.numel() for p in case.build().parameters())
    model = hf_lora.wrap(case.build(), **case.fields)
    scramble(model)
    found = hf_lora.summary(model)
    assert found.base_parameters == base
    (one,) = found.adapters
    registry = registry_of(model)
    tensors = [tensor for *_, tensor in registry.tensors("default")]
    assert one.parameters == sum(tensor.numel() for tensor in tensors)
    assert one.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert one.layers == len(low_rank(registry)) == len(one.norms)
    for path, norm in one.norms.items():
        dense = low_rank(registry)[path].lora_delta("default").double().norm().item()
        assert norm == pytest.approx(dense, rel=1e-5)
    assert not one.dead


def test_states_and_dead_layers_are_told():
    model = Net()
    hf_lora.wrap(model, "q_proj", r=2, train=["head"])
    scramble(model)
    hf_lora.add_adapter(model, "cold", ["q_proj", "v_proj"], r=1, trainable=False)
    hf_lora.merge(model)
    first, second = hf_lora.summary(model).adapters
    assert (first.active, first.trainable, first.merged, first.trained) == (
        True,
        True,
        True,
        ("head",),
    )
    assert (second.active, second.trainable, second.merged) == (False, False, False)
    assert len(second.dead) == second.layers == 4
    lines = str(hf_lora.summary(model)).splitlines()
    assert (
        lines[0]
        == f"Net: {sum(p.numel() for p in Net().parameters()):,} parameters of the base, frozen"
    )
    assert lines[1].startswith("  default: active, training, merged; 2 layers, ")
    assert lines[2] == "    in full: head"
    assert lines[4].startswith("  cold: inactive, frozen; 4 layers, ")
    assert lines[5].endswith("4 layers unchanged")


def test_the_norm_needs_no_dense_product():
    a, b = torch.randn(3, 50), torch.randn(70, 3)
    assert update_norm(a, b, 0.5) == pytest.approx((0.5 * b.double() @ a.double()).norm().item())
    assert update_norm(a, torch.zeros(70, 3), 2.0) == 0.0
    tiny = 1e-30 * torch.ones(2, 2)
    assert update_norm(tiny, tiny, 1.0) == pytest.approx(4e-60)


def test_a_merge_does_not_change_the_updates():
    case = CASES["llama tied head"]
    model = hf_lora.wrap(case.build(), **case.fields)
    scramble(model)
    before = hf_lora.summary(model)
    hf_lora.merge(model)
    assert hf_lora.summary(model).adapters[0].norms == before.adapters[0].norms
