"""Adapters in the formats of MLX, diffusers and kohya's scripts: read as what they are."""

import json
import random
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_lora
from hf_lora.files.read import read_folder
from tests.clients.gguf_base import write_base
from tests.clients.test_diffusion import (
    FIELDS,
    LAYERS,
    clip,
    flux,
    from_noise,
    from_patches,
    from_words,
    unet,
)
from tests.clients.test_llama_cpp import ADAPTERS, IDS, adapted, llama
from tests.tiny_base import Run, run

__all__ = ["run"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
def test_mlx_both_ways(base: Path, tmp_path: Path, run: Run, fields: dict[str, Any]):
    model = adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", **fields)
    hf_lora.export(tmp_path / "adapter", tmp_path / "mlx", "mlx")
    close(logits(hf_lora.from_pretrained(tmp_path / "mlx")), logits(model))
    fresh = AutoModelForCausalLM.from_pretrained(base)
    hf_lora.load(fresh, tmp_path / "mlx" / "adapters.safetensors")
    close(logits(fresh), logits(model))
    assert "in MLX's format" in run("show", tmp_path / "mlx").stdout


def test_a_gguf_file_is_shown_and_nothing_else(base: Path, tmp_path: Path, run: Run):
    adapted(
        AutoModelForCausalLM.from_pretrained(base),
        tmp_path / "adapter",
        **ADAPTERS["with overrides"],
    )
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", "llama.cpp")
    saved = json.loads(run("show", tmp_path / "adapter", "--json").stdout)
    for source in (tmp_path / "out", tmp_path / "out" / "adapter.gguf"):
        found = json.loads(run("show", source, "--json").stdout)
        assert found["format"] == "llama.cpp's format"
        assert found["parameters"] == saved["parameters"]
        assert sum(found["causes"].values()) == found["file_bytes"]
        # the order of rows and where the scale is change no norm
        norms = [sorted(layer["norm"] for layer in each["layers"]) for each in (found, saved)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        with pytest.raises(hf_lora.UnsupportedAdapterError, match="can only be shown"):
            hf_lora.load(AutoModelForCausalLM.from_pretrained(base), source)
        with pytest.raises(hf_lora.UnsupportedAdapterError, match="can only be shown"):
            hf_lora.export(source, tmp_path / "again", "mlx")


def test_damaged_gguf_files_raise_nothing_else(base: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted(model, tmp_path / "adapter", **ADAPTERS["one layer"])
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", "llama.cpp")
    file = tmp_path / "out" / "adapter.gguf"
    whole = file.read_bytes()
    end = whole.index(b"lora_b") + 64
    chance, refused = random.Random(0), 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(end)
            new = bytes([chance.choice([0, 1, 2, 8, 9, 127, 255])] * chance.choice([1, 4, 8]))
            damaged[at : at + chance.choice([0, 1, 8])] = new
        file.write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        try:
            read_folder(file)
        except hf_lora.AdapterFileError:
            refused += 1
    assert refused > 500
    write_base(llama(), file, "llama")
    with pytest.raises(hf_lora.AdapterFileError, match="and not of a LoRA adapter"):
        read_folder(file)


def test_untied_ends_in_mlx_are_what_they_are(tmp_path: Path):
    llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted(model, tmp_path / "adapter", targets=["embed_tokens", "lm_head"], r=2, alpha=3)
    hf_lora.export(tmp_path / "adapter", tmp_path / "mlx", "mlx")
    close(logits(hf_lora.from_pretrained(tmp_path / "mlx")), logits(model))


@pytest.mark.parametrize("client", ["diffusers", "kohya"])
def test_a_unets_both_ways(tmp_path: Path, client: str):
    unet().save_pretrained(tmp_path / "unet")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    adapted(model, tmp_path / "adapter", targets=LAYERS, **FIELDS)
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", client)
    fresh = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    hf_lora.load(fresh, tmp_path / "out")
    close(from_noise(fresh), from_noise(model))


def test_what_diffusers_itself_writes(tmp_path: Path):
    torch.manual_seed(0)
    model = flux()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["to_q", "to_v", "proj_mlp"],
        rank_pattern={"to_v": 2},
        alpha_pattern={"proj_mlp": 3},
        init_lora_weights=False,
    )
    model.add_adapter(config)
    with torch.no_grad():
        wanted = from_patches(model)
    model.save_lora_adapter(tmp_path / "out")  # without the name of a component
    fresh = flux()
    assert (from_patches(fresh) - wanted).abs().max() > 0.1
    state = {
        f"transformer.{name}": tensor
        for name, tensor in get_peft_model_state_dict(model, adapter_name="default").items()
    }
    metadata = json.loads(json.dumps(config.to_dict(), default=list))
    said = {f"transformer.{name}": value for name, value in metadata.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(said)}
    (tmp_path / "header").mkdir()
    save_file(state, tmp_path / "header" / "pytorch_lora_weights.safetensors", header)
    hf_lora.load(fresh, tmp_path / "header")
    close(from_patches(fresh), wanted)
    again = flux()
    hf_lora.load(again, tmp_path / "out")
    close(from_patches(again), wanted)


def test_the_names_that_diffusers_had_before(tmp_path: Path):
    unet().save_pretrained(tmp_path / "unet")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    adapted(model, tmp_path / "adapter", targets=["to_q", r"to_out\.0", "proj_in"], r=2, alpha=2)
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", "kohya")
    state, alphas = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path / "out"), weight_name="lora.safetensors", unet_config=model.config
    )
    assert any(".processor.to_out_lora.down.weight" in name for name in state)
    (tmp_path / "old").mkdir()
    old = {**state, **{name: torch.tensor(alpha) for name, alpha in (alphas or {}).items()}}
    save_file(old, tmp_path / "old" / "pytorch_lora_weights.safetensors")
    fresh = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    hf_lora.load(fresh, tmp_path / "old")
    close(from_noise(fresh), from_noise(model))


@pytest.mark.parametrize(
    ("client", "name"),
    [("diffusers", "pytorch_lora_weights.safetensors"), ("kohya", "lora.safetensors")],
)
def test_one_component_of_several(tmp_path: Path, client: str, name: str):
    known = {"unet": (unet, from_noise, "to_q"), "text_encoder": (clip, from_words, "q_proj")}
    both, wanted = {}, {}
    for component, (make, outputs, target) in known.items():
        make().save_pretrained(tmp_path / component)
        model = type(make()).from_pretrained(tmp_path / component)
        adapted(model, tmp_path / f"{component}-adapter", targets=[target], r=2, alpha=3)
        wanted[component] = outputs(model)
        out = tmp_path / f"{component}-out"
        hf_lora.export(tmp_path / f"{component}-adapter", out, client)
        both |= load_file(out / name)
    (tmp_path / "both").mkdir()
    save_file(both, tmp_path / "both" / name)
    with pytest.raises(hf_lora.UnsupportedAdapterError, match=r'subfolder="text_encoder"'):
        read_folder(tmp_path / "both")
    with pytest.raises(hf_lora.AdapterFileError, match="holds no transformer, but"):
        read_folder(tmp_path / "both" / "transformer")
    for component, (make, outputs, _) in known.items():
        fresh = make()
        fresh.load_state_dict(type(fresh).from_pretrained(tmp_path / component).state_dict())
        with warnings.catch_warnings():
            # no alpha in diffusers' without its header; CLIP's names before transformers 5
            warnings.simplefilter("ignore", hf_lora.HfLoRAWarning)
            hf_lora.load(fresh, tmp_path / "both", subfolder=component)
        close(outputs(fresh), wanted[component])


LAYER = "unet.down_blocks.0.attentions.0.proj_in"
SOUND = {f"{LAYER}.lora_A.weight": torch.ones(2, 8), f"{LAYER}.lora_B.weight": torch.ones(8, 2)}
KOHYA = "lora_unet_down_blocks_0_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({f"{LAYER}.dora_scale": torch.ones(8, 1)}, "dora_scale"),
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(8)}, "lora_magnitude_vector"),
        ({f"{LAYER}.lokr_w1": torch.ones(2, 2)}, "lokr_w1"),
        ({"base_model.model.q.lora_A.weight": torch.ones(2, 8)}, "base_model"),
        ({f"{LAYER}.alpha": torch.tensor(float("nan"))}, "is nan, not a number above 0"),
        ({f"{LAYER}.alpha": torch.tensor(-1.0)}, "is -1.0, not a number above 0"),
        ({f"{LAYER}.alpha": torch.ones(2)}, r"has shape \(2,\), and is no number"),
        ({f"{KOHYA}.lora_down.weight": torch.ones(2, 8)}, "has lora_A but not its partner"),
        ({f"{LAYER}.lora.down.weight": torch.ones(2, 8)}, "the same tensor twice"),
    ],
)
def test_what_is_unknown_or_senseless_is_named(
    tmp_path: Path, more: dict[str, torch.Tensor], words: str
):
    save_file({**SOUND, **more}, tmp_path / "x.safetensors")
    with pytest.raises(hf_lora.AdapterFileError, match=words):
        read_folder(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("[1]", "mapping|object"),
        ('{"unet.r": 2, "unet.lora_alpha": "x"}', "lora_alpha is 'x'"),
        ('{"unet.r": 3, "unet.lora_alpha": 4}', "says r=3, the tensors have 2"),
        ('{"unet.r": 2, "unet.lora_alpha": 4, "unet.use_dora": true}', "use_dora"),
        ("{" * 100_000, "JSON"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, said: str, words: str):
    save_file(SOUND, tmp_path / "x.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(hf_lora.AdapterFileError, match=words):
        read_folder(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
        ({"lora_parameters": {"rank": 2}}, "has no scale"),
        ({"lora_parameters": {"scale": -1}}, "has no scale, a number above 0, but -1"),
        ({"lora_parameters": 7}, "has no scale"),
        (None, "adapter_config.json"),
    ],
)
def test_mlx_files_that_are_not_sound(tmp_path: Path, config: Any, words: str):
    layer = "model.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_a": torch.ones(8, 2), f"{layer}.lora_b": torch.ones(2, 8)}
    save_file(tensors, tmp_path / "adapters.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises((hf_lora.AdapterFileError, OSError), match=words):
        read_folder(tmp_path)


def test_experts_of_mlx_are_refused_by_name(tmp_path: Path):
    layer = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{layer}.lora_a": torch.ones(4, 2, 8), f"{layer}.lora_b": torch.ones(4, 8, 2)}
    save_file(tensors, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_parameters": {"scale": 2.0}}')
    with pytest.raises(hf_lora.UnsupportedAdapterError, match="switch_mlp"):
        read_folder(tmp_path)


def test_damaged_files_raise_nothing_else(tmp_path: Path):
    """Bytes of the header changed, taken out, put in: an AdapterFileError or a sound adapter."""
    said = json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"^a": 2}})
    tensors = {**SOUND, f"{KOHYA}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": said})
    whole = (tmp_path / "x.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(end)
            damaged[at : at + chance.randrange(2)] = chance.choice([b"", b"{", b'"', b"9", b"."])
        (tmp_path / "x.safetensors").write_bytes(damaged)
        try:
            read_folder(tmp_path / "x.safetensors")
        except hf_lora.AdapterFileError:
            continue


def test_what_was_written_for_others_becomes_pefts_again(base: Path, tmp_path: Path):
    fields = ADAPTERS["with overrides"]
    model = adapted(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", **fields)
    hf_lora.export(tmp_path / "adapter", tmp_path / "mlx", "mlx")
    hf_lora.export(tmp_path / "mlx", tmp_path / "back", "peft")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "back")
    )
    close(logits(theirs), logits(model))
    hf_lora.merge_checkpoint(base, tmp_path / "mlx", tmp_path / "merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model))


def test_flux_without_any_header_has_a_scale_of_one(tmp_path: Path):
    flux().save_pretrained(tmp_path / "transformer")
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    adapted(model, tmp_path / "adapter", targets=["to_q", "to_k"], r=3, alpha=5)
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", "diffusers")
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    fresh = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    with pytest.warns(hf_lora.HfLoRAWarning, match="no alpha is said for"):
        hf_lora.load(fresh, tmp_path / "bare.safetensors")
    close(from_patches(fresh), from_patches(model))
