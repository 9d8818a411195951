"""What a plan says of many processes: sums that can be checked without any of them."""

import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from hf_lora import ConfigError
from hf_lora.planning.records import PerRank
from tests.integrations import training
from tests.model.models import gpt2, packed


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


def ways(model: nn.Module, world: int, targets: Any, **fields: Any) -> dict[str, PerRank]:
    found = hf_lora.plan(model, targets, world=world, **fields)
    return {each.strategy: each for each in found.per_rank}


def left_out(model: nn.Module, world: int, **fields: Any) -> str:
    """Why tensor parallelism is left out of a plan."""
    found = hf_lora.plan(model, r=2, world=world, **fields)
    assert "tensor parallel" not in [each.strategy for each in found.per_rank]
    (note,) = [each for each in found.notes if each.startswith("tensor parallelism is left out: ")]
    assert f"note: {note}" in str(found).splitlines()
    return note


def test_fsdp2_pads_the_first_dimension_of_each_tensor():
    found = ways(nn.Sequential(nn.Linear(10, 5, bias=False)), 4, "0", r=3)
    # rows of a part: W 5 -> 2, A 3 -> 1, B 5 -> 2
    base, adapter = 2 * 10 * 4, (1 * 10 + 2 * 3) * 4
    fsdp = found["FSDP2"]
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (144, 64, 128)
    assert fsdp.gathered == 4 * 144
    assert fsdp.sent == 3 * (base + adapter) + 3 * adapter == 624
    assert fsdp.sent_in_full == 3 * 2 * base == 480
    assert fsdp.sent_to_save == 3 * adapter == 192
    assert found["FSDP2, parts on the CPU"].host == 144 + 64 + 128
    # the others cut anywhere: 50 numbers of W, 45 of A and B
    zero = found["ZeRO-3"]
    assert (zero.weights, zero.gradients, zero.gathered) == (95, 45, 380)
    assert zero.sent_to_save == found["DDP"].sent // 2 == 135


def test_buffers_of_what_is_trained_in_full_stay_whole():
    model = nn.Sequential(nn.Linear(10, 5, bias=False), nn.BatchNorm1d(5))
    fsdp = ways(model, 4, "0", r=3, train=["1"])["FSDP2"]
    # weight and bias of the norm: 2 of 5 numbers each; its buffers: 5, 5, and one of 8 bytes
    assert fsdp.weights == 144 + 16 + 16 + 48
    assert (fsdp.gradients, fsdp.optimizer) == (64 + 16, 2 * (64 + 16))
    assert fsdp.sent_to_save == 3 * (64 + 16)


def test_the_largest_part_of_tensor_parallelism_counts():
    fields = {"num_key_value_heads": 4, "intermediate_size": 50}
    targets = ["gate_proj", "down_proj"]
    found = ways(training.llama(**fields), 4, targets, r=6)["tensor parallel"]
    # 50 columns or rows are cut into 13, 13, 13 and 11
    layer = 4 * 8 * 32 * 4 + 3 * 13 * 32 * 4 + 2 * 32 * 4
    split, whole = 2 * 2 * 13 * 6 * 4, 2 * 2 * 32 * 6 * 4
    assert found.weights == 2 * layer + 2 * 12 * 32 * 4 + 32 * 4 + split + whole == 26208
    assert found.gradients == split + whole == 4320
    assert found.optimizer == 2 * found.gradients
    assert found.sent == 2 * 3 * whole // 4 == 4608
    assert found.sent_to_save == 3 * split == 3744


def test_biases_of_layers_split_by_rows_stay_whole():
    fields = {"num_key_value_heads": 4, "intermediate_size": 50}
    without, with_bias = (
        ways(training.llama(**fields, **more), 4, "q_proj", r=6)["tensor parallel"]
        for more in ({}, {"attention_bias": True, "mlp_bias": True})
    )
    # q, k, v: 8 of 32; gate, up: 13 of 50; o, down: 32
    assert with_bias.weights - without.weights == 2 * (3 * 8 + 2 * 13 + 2 * 32) * 4


def test_heads_of_a_model_of_images_and_text_are_the_text_s():
    text = {"model_type": "llama", "vocab_size": 48, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "num_hidden_layers": 2}
    size = {"hidden_size": 32, "intermediate_size": 40}
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 1, "image_size": 8}
    vision |= {"num_attention_heads": 4, "patch_size": 4}
    config = hf.LlavaConfig(text_config=text | size, vision_config=vision | size)
    with torch.device("meta"):
        model = hf.LlavaForConditionalGeneration(config)
    assert "tensor parallel" in ways(model, 2, "q_proj", r=2)
    assert "4 processes cannot share 2 heads" in left_out(model, 4)


def test_why_tensor_parallelism_is_left_out_is_said():
    assert "GPT2LMHeadModel has no tp_plan" in left_out(gpt2(), 2)
    assert "Sequential has no tp_plan" in left_out(packed(), 2)
    assert "4 processes cannot share 2 heads" in left_out(training.llama(), 4)
    assert "here lm_head" in left_out(training.llama(), 2, train=["lm_head"])
    model = training.llama()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    assert "the base is quantized" in left_out(model, 2, targets="q_proj")


@pytest.mark.parametrize(
    ("config", "styles"),
    [
        (hf.Qwen3Config, "'replicated_with_grad_allreduce'"),
        (hf.MixtralConfig, "'moe_tp_experts', 'packed_colwise' of a parameter, 'rowwise' of a"),
    ],
)
def test_unknown_styles_are_told_by_name(config: Any, styles: str):
    fields = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config(**fields, **heads))
    assert f"styles that are not counted: {styles}" in left_out(model, 2, targets="q_proj")
