"""Models of several towers: the plan counts each, and a forgotten one is told once."""

import pytest
import transformers as hf

import hf_lora
from hf_lora.errors import HfLoRAWarning
from tests.families.test_audio import whisper
from tests.families.test_vision import clip
from tests.families.test_vision_language import llava, qwen2_5_vl
from tests.integrations.training import llama


def mixed() -> hf.VisionEncoderDecoderModel:
    """A ViT that is read by a BERT: two models of other names in one."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sees = hf.ViTModel(hf.ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8))
    config = {"vocab_size": 48, "is_decoder": True, "add_cross_attention": True}
    writes = hf.BertLMHeadModel(hf.BertConfig(**sizes, **config, num_hidden_layers=1))
    return hf.VisionEncoderDecoderModel(encoder=sees, decoder=writes)


def towers(model: object, targets: object = "all-linear", **fields: object) -> dict:
    plan = hf_lora.plan(model, targets, **fields)
    assert not plan.problems
    return {tower.path: (tower.adapted, tower.layers) for tower in plan.towers}


def test_each_tower_is_counted():
    assert towers(llava()) == {"model.vision_tower": (12, 12), "model.language_model": (14, 14)}
    assert towers(whisper(), ["k_proj"]) == {"model.encoder": (2, 12), "model.decoder": (4, 20)}
    assert towers(clip(), "mlp") == {"text_model": (4, 12), "vision_model": (4, 12)}
    assert towers(mixed(), ["query"]) == {"encoder": (0, 13), "decoder": (2, 12)}


def test_what_is_trained_in_full_counts():
    found = towers(qwen2_5_vl(), ["q_proj"], train=["visual"])
    assert found == {"model.visual": (1, 12), "model.language_model": (2, 14)}


def test_a_model_of_one_row_of_blocks_has_none():
    assert towers(llama()) == {}
    assert "tower" not in str(hf_lora.plan(llama()))


@pytest.mark.parametrize(
    ("make", "targets", "line"),
    [
        (qwen2_5_vl, ["q_proj", "v_proj"], r"model\.visual \(.*none of its 12 linear layers, such"),
        (mixed, ["query", "value"], r"encoder \(ViTModel\): .* such as q_proj, k_proj, v_proj"),
        (llava, "gate_proj", r"exclude=\['vision_tower\.\*'\]"),
    ],
)
def test_a_tower_of_which_no_pattern_means_a_layer_is_told(make, targets, line):
    with pytest.warns(HfLoRAWarning, match=line):
        hf_lora.wrap(make(), targets, r=2)


@pytest.mark.parametrize(
    ("make", "targets", "exclude"),
    [
        (qwen2_5_vl, r"language_model\..*q_proj", ()),
        (qwen2_5_vl, ["q_proj"], [r"visual\..*"]),
        (llava, "all-linear", [r"vision_tower\..*"]),
        (whisper, [r"decoder\..*q_proj"], ()),
        (whisper, ["encoder_attn.q_proj"], ()),
    ],
)
def test_one_that_is_spoken_of_is_not(make, targets, exclude):
    hf_lora.wrap(make(), targets, exclude=exclude, r=2)  # a warning would be an error
