"""Adapters of a model inside another one, and layers that a file promises and does not have."""

from pathlib import Path

import pytest
import torch
import transformers

import hf_lora
from tests.files import edit
from tests.files.refusing import refuse
from tests.files.wild import TEXT, Shape, llava, seeded, text_model
from tests.oracle.adapting import scramble


def towers() -> Shape:
    """Two models of the same layers side by side."""
    sizes = {**TEXT, "projection_dim": 16, "num_key_value_heads": None}
    config = transformers.CLIPConfig(
        text_config={k: v for k, v in sizes.items() if v is not None},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                       "num_attention_heads": 4, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    return Shape(seeded(transformers.CLIPModel, config), {})


def test_where_several_parts_have_the_names_they_are_named(tmp_path: Path):
    shape = towers()
    layers = shape.layers("q_proj", inside="text_model")
    shape.adapt(layers, name=lambda path: path.replace("text_model.", ""))
    shape.say(target_modules=["q_proj"]).write(tmp_path)
    words = "text_model, vision_model", "hf_lora.load(model.get_submodule(...), source)"
    refuse(tmp_path, *words, model=shape.build())
    part = shape.build().get_submodule("text_model")
    assert hf_lora.load(part, tmp_path) is part


def test_what_lies_outside_is_named_and_nothing_else(tmp_path: Path):
    shape = llava()
    shape.adapt(shape.layers("q_proj")).say(target_modules=["q_proj"]).write(tmp_path)
    said = refuse(tmp_path, "model.vision_tower.encoder", model=text_model().build())
    assert "language_model" not in said


def test_a_vision_adapter_is_not_taken_for_a_text_model(tmp_path: Path):
    shape = llava()
    layers = shape.layers("q_proj", inside="vision_tower")
    shape.adapt(layers, name=lambda path: path.replace("model.vision_tower.", ""))
    shape.say(target_modules=["q_proj"]).write(tmp_path)
    refuse(tmp_path, "encoder.layers.0.self_attn.q_proj", model=text_model().build())


def test_our_own_file_is_compared_with_the_text_model_inside(tmp_path: Path):
    model = hf_lora.wrap(text_model().build(), "q_proj", r=2)
    scramble(model)
    hf_lora.save(model, tmp_path)
    other = llava().build()
    with pytest.raises(hf_lora.BaseMismatchError):
        hf_lora.load(other, tmp_path)
    with torch.no_grad():
        other.model.language_model.load_state_dict(
            {
                k.removeprefix("model."): v
                for k, v in text_model().build().state_dict().items()
                if k.startswith("model.")
            }
        )
    with pytest.warns(hf_lora.HfLoRAWarning, match="trained on another model"):
        hf_lora.load(other, tmp_path, check_base=False)
    inside = other.model.language_model.layers[0].self_attn.q_proj
    assert torch.equal(inside.lora_B, model.model.layers[0].self_attn.q_proj.lora_B)


class TestMissing:
    def test_only_the_two_words_are_known(self, tmp_path: Path):
        with pytest.raises(hf_lora.ConfigError, match="one of 'error', 'zero', not 'skip'"):
            hf_lora.load(text_model().build(), tmp_path, missing="skip")

    def test_half_a_pair_is_damage_whatever_is_said(self, tmp_path: Path):
        shape = text_model()
        shape.adapt(shape.layers("q_proj")).say(target_modules=["q_proj"]).write(tmp_path)
        edit.change_tensors(tmp_path, lambda tensors: tensors.pop(min(tensors)))
        refuse(tmp_path, "but not its partner", model=shape.build(), missing="zero")

    def test_our_own_file_lacks_nothing(self, tmp_path: Path):
        model = hf_lora.wrap(text_model().build(), "q_proj", r=2)
        hf_lora.save(model, tmp_path)
        tensors, metadata = edit.read_tensors(tmp_path)
        kept = {key: tensor for key, tensor in tensors.items() if ".0." in key}
        metadata.pop("hf_lora_sha256")
        edit.write_tensors(tmp_path, kept, metadata)
        refuse(tmp_path, "has no tensors", model=text_model().build(), missing="zero")

    def test_what_is_saved_again_promises_what_it_has(self, tmp_path: Path):
        shape = text_model()
        layers = shape.layers("q_proj", inside="layers.0")
        shape.adapt(layers).say(target_modules=["q_proj"]).write(tmp_path / "a")
        with pytest.warns(hf_lora.HfLoRAWarning, match="1 in all"):
            model = hf_lora.load(shape.build(), tmp_path / "a", missing="zero")
        hf_lora.save(model, tmp_path / "b")
        edit.as_pefts(tmp_path / "b")
        hf_lora.load(shape.build(), tmp_path / "b")
