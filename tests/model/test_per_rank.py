"""What a plan says of many processes: sums that can be checked without any of them."""

import math

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import ConfigError
from tests.hf import training


def plan(world: int, **fields: object) -> hf_lora.Plan:
    return hf_lora.plan(
        training.llama(), targets=["q_proj", "down_proj"], r=4, world=world, **fields
    )


def test_one_process_shares_nothing():
    assert plan(1).per_rank == ()
    assert "processes" not in str(plan(1))


@pytest.mark.parametrize("world", [0, -1, 2.0, True, "2", None])
def test_what_is_no_number_of_processes_is_refused(world: object):
    with pytest.raises(ConfigError, match="number of processes"):
        hf_lora.plan(training.llama(), world=world)  # type: ignore[arg-type]


def test_all_shares_together_are_the_whole():
    found = plan(4)
    shares = {each.strategy: each for each in found.per_rank}
    assert set(shares) == {"DDP", "ZeRO-2", "FSDP2", "ZeRO-3", "FSDP2, parts on the CPU"}
    everything = found.base_bytes + found.weight_bytes
    assert shares["DDP"].weights == shares["ZeRO-2"].weights == everything
    for name in ("FSDP2", "ZeRO-3"):
        assert shares[name].weights == math.ceil(everything / 4)
        assert shares[name].gradients == math.ceil(found.gradient_bytes / 4)
    assert shares["FSDP2"].optimizer == math.ceil(found.adam_bytes / 4)
    cpu = shares["FSDP2, parts on the CPU"]
    assert cpu.device == shares["FSDP2"].gathered
    assert cpu.host == shares["FSDP2"].device - shares["FSDP2"].gathered
    assert all(each.sent < each.sent_in_full for each in found.per_rank)


def test_tensor_parallelism_needs_heads_to_share():
    assert "tensor parallel" in [each.strategy for each in plan(2).per_rank]
    assert "tensor parallel" not in [each.strategy for each in plan(4).per_rank]
    assert "tensor parallel" not in [each.strategy for each in plan(2, train=["lm_head"]).per_rank]


def test_any_module_has_a_plan_for_many():
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))
    found = hf_lora.plan(model, targets=".*", r=2, world=2)
    fsdp = next(each for each in found.per_rank if each.strategy == "FSDP2")
    layer = (64 + 8 + 2 * 16) * 4
    assert fsdp.gathered == layer + 2 * layer  # what is in no list, and two that are
    assert fsdp.sent == (2 * 2 * layer + layer) // 2 + 3 * 2 * 16 * 4 // 2


def test_a_model_without_weights_has_the_same():
    with torch.device("meta"):
        bare = training.llama()
    fields = {"targets": ["q_proj", "down_proj"], "r": 4}
    assert hf_lora.plan(bare, world=2, **fields).per_rank == plan(2).per_rank


def test_the_table_has_a_line_for_each_way():
    found = plan(2)
    lines = str(found).splitlines()
    (start,) = (n for n, line in enumerate(lines) if line.startswith("each of 2 processes"))
    for each, line in zip(found.per_rank, lines[start + 2 :], strict=False):
        assert line.strip().startswith(each.strategy)
