"""The marks of transformers that hf_lora reads: each is there, and means what it is taken for."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

from hf_lora.compat.transformers import (
    is_backbone,
    is_filled,
    is_initialized,
    is_of_its_checkpoint,
    was_loaded,
)

CONFIG = hf.BertConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=4,
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder: Path = tmp_path_factory.mktemp("base")
    hf.BertModel(CONFIG).save_pretrained(folder)
    return hf.BertForSequenceClassification.from_pretrained(folder)


def test_a_load_marks_the_parameters_that_it_fills(loaded: nn.Module):
    """Without ``_is_hf_initialized`` on Parameters no fresh head would be found."""
    assert {name for name, p in loaded.named_parameters() if not is_filled(p)} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert not any(map(is_filled, hf.BertForSequenceClassification(CONFIG).parameters()))


def test_a_load_marks_every_module_that_it_makes(loaded: nn.Module):
    """Without it a layer that somebody put in afterwards would look like a fresh one."""
    assert all(is_initialized(module) for module in loaded.modules())
    assert not is_initialized(nn.Linear(1, 1))


def test_a_loaded_model_says_so_and_keeps_the_class_of_its_checkpoint(loaded: nn.Module):
    assert was_loaded(loaded)
    assert not was_loaded(hf.BertModel(CONFIG))
    assert is_of_its_checkpoint(loaded, hf.BertModel)
    assert not is_of_its_checkpoint(loaded, hf.BertForSequenceClassification)


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("BertModel", True),
        ("ViTModel", True),
        ("Wav2Vec2Model", True),
        ("LlavaModel", True),
        ("BertForSequenceClassification", False),
        ("EncoderDecoderModel", False),
        ("CLIPModel", False),
        ("VisionTextDualEncoderModel", False),
        ("CLIPVisionModelWithProjection", False),
    ],
)
def test_a_backbone_is_told_from_the_model_of_a_task(name: str, bare: bool):
    assert is_backbone(getattr(hf, name)) is bare


def test_embeddings_keep_their_parameter_when_the_vocabulary_is_resized(tmp_path: Path):
    """Without that a resized output head could not be told from a fresh one."""
    config = hf.LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(56)
    assert model.model.embed_tokens.weight.shape == torch.Size([56, 32])
    assert is_filled(model.model.embed_tokens.weight)
    assert not is_filled(model.lm_head.weight)
