"""Mixtures of experts with dense layers or shared experts, whose names PEFT takes for experts'."""

import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf

import hf_lora
from tests.files import edit
from tests.files.both_ways import quiet
from tests.files.wild import IDS, TEXT, seeded
from tests.oracle.adapting import PLAIN, TOLERANCE, distance, logits, scramble

pytestmark = quiet

EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
DEEPSEEK = {
    **TEXT,
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS: dict[str, Callable] = {
    "DeepSeek-V3": seeded(hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**DEEPSEEK)),
    "Qwen3-MoE with a dense layer": seeded(
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(**TEXT, **EXPERTS, num_experts=4, mlp_only_layers=[0]),
    ),
    "Qwen2-MoE with shared experts": seeded(
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(
            **TEXT,
            **EXPERTS,
            num_experts=4,
            shared_expert_intermediate_size=16,
            norm_topk_prob=True,
        ),
    ),
    "Qwen3-Next": seeded(
        hf.Qwen3NextForCausalLM,
        hf.Qwen3NextConfig(
            **TEXT,
            **EXPERTS,
            num_experts=4,
            shared_expert_intermediate_size=16,
            layer_types=["full_attention", "full_attention"],
            head_dim=8,
        ),
    ),
}
INPUTS = {"input_ids": IDS}
TARGETS = r".*(q_proj|gate_proj|up_proj|down_proj)"


def adapted(build: Callable, **fields) -> torch.nn.Module:
    with warnings.catch_warnings():
        # that the experts stay frozen is told, and known here
        warnings.filterwarnings("ignore", message="These parts of the model get no update")
        model = hf_lora.wrap(build(), **{"targets": TARGETS, "r": 2, "alpha": 6.0} | fields)
    for _ in range(3):
        scramble(model)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"overrides": {"down_proj": {"r": 3, "alpha": 5.0}}},
        {"overrides": {"q_proj": {"r": 1}}, "rslora": True},
        {"targets": ["up_proj"]},
    ],
    ids=["plain", "overrides", "rslora", "half of a pair"],
)
def test_peft_reads_it_as_it_is(tmp_path: Path, name: str, fields: dict):
    model = adapted(MODELS[name], **fields)
    expected = logits(model, INPUTS)
    assert distance(expected, logits(MODELS[name](), INPUTS)) > PLAIN
    hf_lora.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path).eval()
    assert distance(logits(theirs, INPUTS), expected) < TOLERANCE
    assert distance(logits(hf_lora.load(MODELS[name](), tmp_path), INPUTS), expected) == 0
    edit.as_pefts(tmp_path)  # and as the JSON alone says it
    assert distance(logits(hf_lora.load(MODELS[name](), tmp_path), INPUTS), expected) == 0


def test_dropout_that_peft_cannot_have_there_is_told(tmp_path: Path):
    model = adapted(MODELS["DeepSeek-V3"], dropout=0.1).eval()
    expected = logits(model, INPUTS)
    with pytest.warns(hf_lora.HfLoRAWarning, match="no dropout there"):
        hf_lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(MODELS["DeepSeek-V3"](), tmp_path).eval()
    assert distance(logits(theirs, INPUTS), expected) < TOLERANCE
    again = hf_lora.load(MODELS["DeepSeek-V3"](), tmp_path)
    assert again.model.layers[0].mlp.up_proj.lora_slots["default"].dropout == 0.1


def test_layers_that_peft_finds_stay_names(tmp_path: Path):
    hf_lora.save(adapted(MODELS["DeepSeek-V3"], targets=["q_proj"]), tmp_path)
    fields = edit.read_config(tmp_path)
    assert fields["target_modules"] == ["q_proj"]
    assert "target_parameters" not in fields


def test_a_file_of_pefts_that_names_weights(tmp_path: Path):
    build = MODELS["DeepSeek-V3"]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["layers.0.mlp.up_proj.weight", "shared_experts.up_proj.weight"],
        rank_pattern={r"layers\.0\.mlp\.up_proj\.weight": 3},
    )
    model = peft.get_peft_model(build(), config).eval()
    for _ in range(3):
        scramble(model)
    model.save_pretrained(tmp_path)
    ours = hf_lora.load(build(), tmp_path)
    assert distance(logits(ours, INPUTS), logits(model, INPUTS)) < TOLERANCE
    assert distance(logits(ours, INPUTS), logits(build(), INPUTS)) > PLAIN
