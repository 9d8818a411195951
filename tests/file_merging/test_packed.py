"""A quantized checkpoint is merged into as the numbers that it stands for."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import hf_lora
from tests.file_merging.families import tensors_in
from tests.model.models import llama
from tests.tiny import scramble

FOURS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4, scales quantized too": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4, float16": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float16},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}


def quantized(folder: Path, **fields: Any) -> Any:
    llama(dtype=torch.bfloat16, **SIZES).save_pretrained(folder / "plain")
    model = hf.AutoModelForCausalLM.from_pretrained(
        folder / "plain",
        dtype=torch.bfloat16,
        quantization_config=hf.BitsAndBytesConfig(**fields),
    )
    model.save_pretrained(folder / "base")
    return hf.AutoModelForCausalLM.from_pretrained(folder / "base")


def adapted(model: Any, folder: Path) -> Path:
    hf_lora.wrap(model, ["q_proj", "down_proj"], r=4)
    scramble(model)
    hf_lora.save(model, folder)
    return folder


def numbers_of(module: Any) -> torch.Tensor:
    weight = module._parameters["weight"]
    if hasattr(weight, "quant_state"):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    return (weight.data.float() * scales[:, None] / 127).to(torch.bfloat16)


def check(model: Any, report: hf_lora.MergeReport, folder: Path) -> None:
    """Compare with what the quantized layers themselves stand for, in float64, rounded once."""
    merged = dict(tensors_in(folder))
    equal = []
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            exact = numbers_of(module).double()
            if isinstance(module, hf_lora.LoRALayer):
                exact = exact + module.lora_delta("default").detach().double()
            found = merged[f"{path}.weight"]
            equal.append((exact.to(found.dtype) == found).flatten())
    assert torch.cat(equal).double().mean() > 0.999
    assert report.weights == "dequantized"
    assert any("is quantized" in line for line in report.told)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info["missing_keys"])
    assert not any(info["unexpected_keys"])
    assert again.dtype in (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("fields", FOURS.values(), ids=FOURS.keys())
def test_four_bits_of_bitsandbytes(fields: dict[str, Any], tmp_path: Path):
    model = quantized(tmp_path, load_in_4bit=True, **fields)
    adapter = adapted(model, tmp_path / "adapter")
    report = hf_lora.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    check(model, report, tmp_path / "out")


def test_eight_bits_of_bitsandbytes(tmp_path: Path):
    model = quantized(tmp_path, load_in_8bit=True)
    adapter = adapted(model, tmp_path / "adapter")
    report = hf_lora.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    check(model, report, tmp_path / "out")


def test_the_original_weights_take_it_as_well_and_the_report_says_which(tmp_path: Path):
    model = quantized(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    adapter = adapted(model, tmp_path / "adapter")
    report = hf_lora.merge_checkpoint(tmp_path / "plain", adapter, tmp_path / "out")
    assert report.weights == "original"
    assert any("was trained on quantized weights" in line for line in report.told)
    before, after = dict(tensors_in(tmp_path / "plain")), dict(tensors_in(tmp_path / "out"))
    name = "model.layers.0.self_attn.q_proj"
    delta = model.get_submodule(name).lora_delta("default").detach().double()
    exact = (before[f"{name}.weight"].double() + delta).to(torch.bfloat16)
    assert (exact == after[f"{name}.weight"]).double().mean() > 0.999


@pytest.mark.parametrize("said", [True, False])
def test_float8_in_blocks(said: bool, tmp_path: Path):
    plain = llama(dtype=torch.bfloat16, **SIZES)
    plain.save_pretrained(tmp_path / "plain")
    adapter = adapted(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), tmp_path / "adapter"
    )
    tensors, right = {}, {}
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        right[name] = tensor
        tensors[name] = tensor
        if "proj" in name:
            blocks = tensor.float().unflatten(0, (-1, 16)).unflatten(2, (-1, 32))
            scales = blocks.abs().amax((1, 3)) / 448
            held = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            right[name] = (held.float() * scales[:, None, :, None]).view(tensor.shape)
            right[name] = right[name].to(torch.bfloat16)
            tensors[name], tensors[f"{name}_scale_inv"] = held.view(tensor.shape), scales
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    if said:
        config["quantization_config"]["weight_block_size"] = [16, 32]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    report = hf_lora.merge_checkpoint(
        tmp_path / "base", adapter, tmp_path / "out", check_base=False, verify=True
    )
    assert report.weights == "dequantized"
    merged, changed = dict(tensors_in(tmp_path / "out")), {each.name for each in report.tensors}
    assert merged.keys() == right.keys()
    for name, tensor in right.items():
        assert (name in changed) != torch.equal(merged[name], tensor), name


def test_what_is_packed_in_an_unknown_way_is_refused(tmp_path: Path):
    plain = llama(dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "base")
    adapter = adapted(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(hf_lora.TargetError, match=f"{name}: .* is packed"):
        hf_lora.merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", check_base=False)
