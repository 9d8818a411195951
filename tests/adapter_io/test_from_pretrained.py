"""``from_pretrained`` finds the class that an adapter's base needs, for each kind of model."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import hf_lora
from tests.files import edit

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
LAYERS = {"num_hidden_layers": 2}
SPEECH = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
MODELS = {
    "causal": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **LAYERS, vocab_size=64)),
    "seq2seq": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1, vocab_size=64)
    ),
    "classifier": lambda: BertForSequenceClassification(
        BertConfig(**SMALL, **LAYERS, vocab_size=64)
    ),
    "vision": lambda: ViTForImageClassification(
        ViTConfig(**SMALL, **LAYERS, image_size=16, patch_size=8)
    ),
    "speech": lambda: WhisperForConditionalGeneration(WhisperConfig(**SPEECH)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_base_gets_the_class_that_it_had(kind: str, tmp_path: Path):
    MODELS[kind]().save_pretrained(tmp_path / "base")
    model = type(MODELS[kind]()).from_pretrained(tmp_path / "base")
    hf_lora.wrap(model, r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("lora_B"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    again = hf_lora.from_pretrained(tmp_path / "adapter")
    assert type(again) is type(model)
    state = again.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def test_an_unknown_class_of_the_base_is_told(tmp_path: Path):
    model = MODELS["vision"]()
    model.save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace("ViTForImageClassification", "TheirOwnModel"))
    model = ViTForImageClassification.from_pretrained(tmp_path / "base")
    hf_lora.wrap(model, r=2).save_pretrained(tmp_path / "adapter")
    assert type(hf_lora.from_pretrained(tmp_path / "adapter")) is ViTForImageClassification
    edit.change_config(tmp_path / "adapter", auto_mapping=...)
    with pytest.raises(hf_lora.AdapterFileError, match=r"TheirOwnModel; pass model_class="):
        hf_lora.from_pretrained(tmp_path / "adapter")
    again = hf_lora.from_pretrained(tmp_path / "adapter", model_class=ViTForImageClassification)
    assert type(again) is ViTForImageClassification
    with pytest.raises(hf_lora.AdapterMismatchError):
        hf_lora.from_pretrained(tmp_path / "adapter", model_class=AnotherModel)


class AnotherModel(T5ForConditionalGeneration):
    """Another architecture than the adapter's."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return MODELS["seq2seq"]()
