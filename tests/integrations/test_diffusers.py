"""diffusers' models: a wrapped one saves its adapter, and opens it by the class's own verb."""

import importlib
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FluxTransformer2DModel,
    ModelMixin,
    UNet2DModel,
)

import hf_lora
from hf_lora.errors import AdapterFileError, BaseMismatchError, HfLoRAWarning, StateError
from hf_lora.integrations import diffusers_models, wrapped_inside
from hf_lora.integrations.in_front import is_in_front
from hf_lora.kinds.lora import LoRALayer
from hf_lora.model.registry import find
from tests.integrations import training

TARGETS = [r"to_out\.0", "time_emb_proj"]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def unet(seed: int = 0) -> Any:
    with training.seeded(seed):
        return UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        ).requires_grad_(False)


def image() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def noise(model: Any) -> torch.Tensor:
    return model.eval()(image(), 3).sample


@torch.no_grad()
def loud(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unet") / "base"
    unet().save_pretrained(folder)
    return folder


def wrapped(base: Path) -> Any:
    model = UNet2DModel.from_pretrained(base).requires_grad_(False)
    return loud(hf_lora.wrap(model, TARGETS, r=2))


def test_it_saves_its_adapter_and_opens_it(base: Path, tmp_path: Path):
    model = wrapped(base)
    assert not torch.equal(noise(model), noise(unet()))
    model.save_pretrained(tmp_path)
    assert training.files(tmp_path) == ADAPTER
    again = UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(noise(again), noise(model))
    assert find(again) is not None
    assert not any(parameter.requires_grad for parameter in again.parameters())
    again.save_pretrained(tmp_path / "again")
    assert training.files(tmp_path / "again") == ADAPTER


def test_as_part_of_a_pipeline(base: Path, tmp_path: Path):
    model = wrapped(base)
    DDPMPipeline(model, DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path)
    assert training.files(tmp_path / "unet") == ADAPTER
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert torch.equal(noise(again.unet), noise(model))
    assert torch.equal(noise(UNet2DModel.from_pretrained(tmp_path, subfolder="unet")), noise(model))


def test_the_base_may_be_in_a_folder_of_a_pipeline(base: Path, tmp_path: Path):
    """diffusers keeps the name of the whole, not of the folder: that has to be said again."""
    shutil.copytree(base, tmp_path / "pipeline" / "unet")
    model = UNet2DModel.from_pretrained(tmp_path / "pipeline", subfolder="unet")
    loud(hf_lora.wrap(model, TARGETS, r=2)).save_pretrained(tmp_path / "adapter")
    again = UNet2DModel.from_pretrained(tmp_path / "adapter", subfolder="unet")
    assert torch.equal(noise(again), noise(model))


def test_the_base_is_checked(base: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    model = UNet2DModel.from_pretrained(other)
    hf_lora.wrap(model, TARGETS, r=2).save_pretrained(tmp_path / "adapter")
    unet(seed=5).save_pretrained(other)
    with pytest.raises(BaseMismatchError):
        UNet2DModel.from_pretrained(tmp_path / "adapter")


def test_an_adapter_without_a_base_says_what_to_do(tmp_path: Path):
    hf_lora.wrap(unet(), TARGETS, r=2).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"names no base model; load a UNet2DModel from"):
        UNet2DModel.from_pretrained(tmp_path)


def test_a_part_of_it_that_is_wrapped_is_saved_with_the_whole(base: Path, tmp_path: Path):
    model = UNet2DModel.from_pretrained(base).requires_grad_(False)
    loud(hf_lora.wrap(model.mid_block, TARGETS, r=2))
    model.save_pretrained(tmp_path)
    assert training.files(tmp_path) == ADAPTER
    assert torch.equal(noise(UNet2DModel.from_pretrained(tmp_path)), noise(model))


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"safe_serialization": False}])
def test_what_an_adapter_cannot_be_saved_as_is_refused(base: Path, tmp_path: Path, options: dict):
    with pytest.raises(StateError, match="is saved as adapter_model"):
        wrapped(base).save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_its_own_verbs_for_adapters_are_ours():
    with training.seeded(0):
        model = FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
        )
    hf_lora.wrap(model, "to_q", r=2)
    assert model.active_adapters() == ["default"]
    model.disable_adapters()
    assert hf_lora.active_adapters(model) == ()
    model.enable_adapters()
    assert hf_lora.active_adapters(model) == ("default",)
    hf_lora.unwrap(model)
    assert not {"active_adapters", "save_pretrained"} & vars(model).keys()


def test_a_plain_model_saves_and_loads_as_ever(base: Path, tmp_path: Path):
    wrapped(base)
    model = UNet2DModel.from_pretrained(base)
    assert not any(isinstance(module, LoRALayer) for module in model.modules())
    model.save_pretrained(tmp_path)
    assert "config.json" in training.files(tmp_path)
    assert torch.equal(noise(UNet2DModel.from_pretrained(tmp_path)), noise(model))
    with pytest.raises(OSError, match=r"config\.json"):
        UNet2DModel.from_pretrained(tmp_path / "nothing")


def test_what_hf_lora_hooks_into_is_there():
    training.wrapped()
    for method in ("from_pretrained", "save_pretrained"):
        assert is_in_front(vars(ModelMixin)[method]), f"ModelMixin.{method}"


@pytest.mark.parametrize("name", wrapped_inside._SAVERS)
def test_whatever_saves_whole_models_is_guarded(name: str):
    training.wrapped()
    owner = getattr(importlib.import_module(name), wrapped_inside._SAVERS[name])
    assert is_in_front(vars(owner)["save_pretrained"]), name
    with pytest.warns(HfLoRAWarning, match="has no save_pretrained"):
        wrapped_inside._patch(types.ModuleType(name))


def test_a_version_without_it_is_warned_of():
    module = types.ModuleType("diffusers.models.modeling_utils")
    with pytest.warns(HfLoRAWarning, match="ModelMixin of this version has no from_pretrained"):
        diffusers_models._patch(module)
