"""Files of stacked experts: PEFT's, read and written with equal outputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import hf_lora
from hf_lora.errors import AdapterMismatchError, UnsupportedAdapterError
from hf_lora.files.safetensors_io import TensorFile
from tests.kinds.expert_models import (
    PARTS,
    TOKENS,
    built,
    gpt_oss,
    mixtral,
    qwen3_moe,
    some,
    wrapped,
)


@some
@pytest.mark.parametrize("targets", [PARTS, PARTS[:1], PARTS[1:], ["q_proj", *PARTS]])
def test_peft_reads_our_files(make: Callable[[], Any], targets: list[str], tmp_path: Path):
    model = wrapped(make, targets=targets)
    hf_lora.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(built(make), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    again = hf_lora.load(built(make), tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    hf_lora.save(again, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@some
@pytest.mark.parametrize("parts", [PARTS, PARTS[:1], PARTS[1:]])
@pytest.mark.parametrize("modules", [[], ["q_proj"]], ids=["experts alone", "with attention"])
def test_we_read_pefts_files(
    make: Callable[[], Any], parts: list[str], modules: list[str], tmp_path: Path
):
    fields: dict[str, Any] = {"target_modules": modules, "target_parameters": parts, "r": 4}
    theirs = get_peft_model(built(make), LoraConfig(**fields, use_rslora=True))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    theirs.eval().save_pretrained(str(tmp_path))
    model = hf_lora.load(built(make), tmp_path)
    torch.testing.assert_close(model(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    hf_lora.save(model, tmp_path / "again")
    again = PeftModel.from_pretrained(built(make), str(tmp_path / "again")).eval()
    torch.testing.assert_close(again(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_keys_are_pefts_positions(tmp_path: Path):
    hf_lora.save(wrapped(qwen3_moe), tmp_path)
    shapes = TensorFile(tmp_path / "adapter_model.safetensors").shapes
    at = "base_model.model.model.layers.0.mlp.experts"
    assert shapes[f"{at}.base_layer.lora_A.weight"] == (15, 32)
    assert shapes[f"{at}.base_layer.lora_B.weight"] == (32, 15)
    assert shapes[f"{at}.lora_A.weight"] == (15, 16)
    assert shapes[f"{at}.lora_B.weight"] == (32, 15)


def test_overrides_reach_pefts_patterns(tmp_path: Path):
    model = wrapped(qwen3_moe, overrides={r"layers\.1\.mlp\.experts": {"r": 2, "alpha": 5.0}})
    hf_lora.save(model, tmp_path)
    theirs = PeftModel.from_pretrained(built(qwen3_moe), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    # without our header, as PEFT would write it
    theirs.save_pretrained(str(tmp_path / "pefts"))
    again = hf_lora.load(built(qwen3_moe), tmp_path / "pefts")
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_a_file_that_names_other_parameters_than_it_holds_is_refused(tmp_path: Path):
    hf_lora.save(wrapped(qwen3_moe), tmp_path)
    at = tmp_path / "adapter_config.json"
    said = json.loads(at.read_text())
    at.write_text(json.dumps(said | {"target_parameters": ["mlp.experts.down_proj"]}))
    with pytest.raises(hf_lora.AdapterFileError, match="factors of 2 parameters, and target_param"):
        hf_lora.load(built(qwen3_moe), tmp_path)
    at.write_text(json.dumps(said | {"target_parameters": ["mlp.experts.w13"]}))
    with pytest.raises(UnsupportedAdapterError, match="w13"):
        hf_lora.load(built(qwen3_moe), tmp_path)


def test_a_file_for_other_experts_is_refused(tmp_path: Path):
    hf_lora.save(wrapped(qwen3_moe), tmp_path)
    with pytest.raises(AdapterMismatchError, match="which is 4 experts of in, out"):
        hf_lora.load(built(mixtral), tmp_path)


def test_a_base_with_other_experts_is_found_out(tmp_path: Path):
    hf_lora.save(wrapped(qwen3_moe), tmp_path)
    base = built(qwen3_moe)
    with torch.no_grad():
        base.model.layers[1].mlp.experts.down_proj.normal_()
    with pytest.raises(hf_lora.BaseMismatchError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        hf_lora.load(base, tmp_path)


def test_two_files_are_loaded_side_by_side(tmp_path: Path):
    one, two = wrapped(gpt_oss, targets=PARTS[1:]), wrapped(gpt_oss, r=2)
    for name, model in (("one", one), ("two", two)):
        hf_lora.save(model, tmp_path / name)
    both = hf_lora.load(built(gpt_oss), tmp_path / "one", adapter="one")
    hf_lora.load(both, tmp_path / "two", adapter="two")
    for name, model in (("one", one), ("two", two)):
        hf_lora.activate(both, name)
        assert torch.equal(both(TOKENS).logits, model(TOKENS).logits)
