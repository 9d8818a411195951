"""Files for diffusers and of kohya's kind, loaded by diffusers, against the wrapped models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

import hf_lora
from tests.clients.test_llama_cpp import adapted

CLOSE = 1e-5
"""Far above what two orders of sums in float32 differ by, far below what an adapter does."""

LAYERS = ["to_q", "to_v", r"resnets\.0\.conv1", r"net\.2"]
FIELDS = {"r": 4, "alpha": 6, "overrides": {"to_v": {"r": 2, "alpha": 7}}}


def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def flux() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def clip() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return CLIPTextModel(CLIPTextConfig(vocab_size=100, num_attention_heads=2, **sizes, **ends))


def from_noise(model: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(3)
    sample = torch.randn(1, 4, 8, 8, generator=noise)
    hidden = torch.randn(1, 5, 16, generator=noise)
    with torch.no_grad():
        return model.eval()(sample, torch.tensor([7]), hidden).sample


def from_patches(model: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(3)
    inputs = {
        "hidden_states": torch.randn(1, 9, 4, generator=noise),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=noise),
        "pooled_projections": torch.randn(1, 16, generator=noise),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    with torch.no_grad():
        return model.eval()(**inputs).sample


def from_words(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[0, 5, 6, 7, 2]])).last_hidden_state


def test_diffusers_computes_what_the_wrapped_unet_does(tmp_path: Path):
    unet().save_pretrained(tmp_path / "unet")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    plain = from_noise(model)
    wanted = from_noise(adapted(model, tmp_path / "adapter", targets=LAYERS, **FIELDS))
    assert (wanted - plain).abs().max() > 1000 * CLOSE
    for client, name in (
        ("diffusers", "pytorch_lora_weights.safetensors"),
        ("kohya", "lora.safetensors"),
    ):
        hf_lora.export(tmp_path / "adapter", tmp_path / client, client)
        fresh = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            str(tmp_path / client),
            weight_name=name,
            unet_config=fresh.config,
            return_lora_metadata=True,
        )
        assert (metadata is None) == (client == "kohya")
        StableDiffusionPipeline.load_lora_into_unet(state, alphas, fresh, metadata=metadata)
        assert (from_noise(fresh) - wanted).abs().max() < CLOSE


def test_diffusers_computes_what_the_wrapped_transformer_does(tmp_path: Path):
    flux().save_pretrained(tmp_path / "transformer")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    plain = from_patches(model)
    wanted = from_patches(
        adapted(model, tmp_path / "adapter", targets="all-linear", rslora=True, **FIELDS)
    )
    assert (wanted - plain).abs().max() > 1000 * CLOSE
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", "diffusers")
    for with_header in (True, False):  # readers that pass over the header are right, too
        fresh = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
        state, metadata = FluxLoraLoaderMixin.lora_state_dict(
            str(tmp_path / "out"), return_lora_metadata=True
        )
        FluxLoraLoaderMixin.load_lora_into_transformer(
            state, None, fresh, metadata=metadata if with_header else None
        )
        assert (from_patches(fresh) - wanted).abs().max() < CLOSE * wanted.abs().max()
    with pytest.raises(hf_lora.UnsupportedAdapterError, match="names of its authors' code"):
        hf_lora.export(tmp_path / "adapter", tmp_path / "kohya", "kohya")


def test_diffusers_computes_what_the_wrapped_text_encoder_does(tmp_path: Path):
    clip().save_pretrained(tmp_path / "text_encoder_2")
    model = CLIPTextModel.from_pretrained(tmp_path / "text_encoder_2")
    plain = from_words(model)
    fields = {"targets": ["q_proj", "fc1"], "r": 4, "alpha": 6}
    wanted = from_words(adapted(model, tmp_path / "adapter", **fields))
    assert (wanted - plain).abs().max() > 1000 * CLOSE
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", "diffusers")
    state, _, metadata = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path / "out"), return_lora_metadata=True
    )
    # as it has been called since before transformers 5
    assert "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in state
    fresh = CLIPTextModel.from_pretrained(tmp_path / "text_encoder_2")
    StableDiffusionPipeline.load_lora_into_text_encoder(
        state, None, fresh, prefix="text_encoder_2", metadata=metadata
    )
    assert (from_words(fresh) - wanted).abs().max() < CLOSE
    hf_lora.export(tmp_path / "adapter", tmp_path / "kohya", "kohya")
    names = load_file(tmp_path / "kohya" / "lora.safetensors")
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in names


def test_the_header_and_the_alphas(tmp_path: Path):
    unet().save_pretrained(tmp_path / "unet")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    adapted(model, tmp_path / "adapter", targets=["to_q", "to_k", "to_v"], **FIELDS)
    hf_lora.export(tmp_path / "adapter", tmp_path / "diffusers", "diffusers")
    with safe_open(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (said["unet.r"], said["unet.lora_alpha"]) == (4, 4)
    assert said["unet.rank_pattern"] == said["unet.alpha_pattern"] == {"to_v": 2}
    hf_lora.export(tmp_path / "adapter", tmp_path / "kohya", "kohya")
    alphas = {
        float(tensor)
        for name, tensor in load_file(tmp_path / "kohya" / "lora.safetensors").items()
        if name.endswith(".alpha")
    }
    assert alphas == {6.0}


def test_a_component_that_is_not_known_is_asked_for(tmp_path: Path):
    model = unet()
    adapted(model, tmp_path / "adapter", targets=["to_q"], r=2, alpha=4)
    with pytest.raises(hf_lora.UnsupportedAdapterError, match="component's folder with base="):
        hf_lora.export(tmp_path / "adapter", tmp_path / "out", "diffusers")
    # a folder that happens to begin like a component is none; its class says what it is
    model.save_config(tmp_path / "unet-of-mine")
    where = {"base": tmp_path / "unet-of-mine"}
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", "diffusers", **where)
    names = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.") for name in names)
