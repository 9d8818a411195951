"""``export`` and ``servable``: folders for PEFT and vLLM, verdicts, refusals, the command."""

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_lora
from tests.clients.test_llama_cpp import ADAPTERS, IDS, adapted, llama
from tests.tiny_base import Run, run

__all__ = ["run"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def made(base: Path, folder: Path, **fields: Any) -> torch.Tensor:
    """Make an adapter and return the wrapped model's logits."""
    return logits(adapted(AutoModelForCausalLM.from_pretrained(base), folder, **fields))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("client", ["peft", "vllm"])
@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
def test_peft_computes_the_same_with_a_plain_folder(
    base: Path, tmp_path: Path, client: str, fields: dict[str, Any]
):
    wanted = made(base, tmp_path / "adapter", **fields)
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", client)
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # PEFT 0.5 knows these, and stops at others
    assert said.keys() <= {
        "alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
        "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "task_type",
    }  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "out"))
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-5)
    ours = hf_lora.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-5, atol=1e-5)


def test_vllm_gets_one_rank_of_its_own_and_the_head(base: Path, tmp_path: Path):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.config.pad_token_id = 0
    fields = {"targets": ["q_proj", "v_proj"], "overrides": {"v_proj": {"r": 2}}}
    adapted(model, tmp_path / "adapter", r=5, alpha=10, **fields)
    done = hf_lora.export(tmp_path / "adapter", tmp_path / "out", "vllm")
    assert "Ranks 2, 5 were filled up with zeros to 8." in done.notes
    assert "--max-lora-rank 8" in done.notes[-1]
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["r"], "rank_pattern" in said) == (8, False)
    for name, tensor in before.items():
        if "lora" not in name:
            assert torch.equal(after[name], tensor)
            continue
        kept = tuple(slice(size) for size in tensor.shape)
        assert torch.equal(after[name][kept], tensor)
        assert after[name].count_nonzero() == tensor.count_nonzero()
        assert 8 in after[name].shape


def test_who_can_use_it(base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter", **ADAPTERS["rank-stabilized"])
    found = hf_lora.servable(tmp_path / "adapter")
    works = {verdict.client: verdict.works for verdict in found.clients}
    assert works == {
        "peft": True, "vllm": True, "llama.cpp": True, "ollama": True, "mlx": True,
        "diffusers": False, "kohya": False,
    }  # fmt: skip
    assert found.base == str(base)
    assert found["mlx"].way == 'hf_lora.export(adapter, output, "mlx")'
    assert "component" in found["kohya"].reasons[0]
    assert json.loads(found.to_json()) == json.loads(json.dumps(found.to_dict()))
    assert "vllm: yes, as it is saved" in str(found)
    with pytest.raises(KeyError):
        found["tgi"]


def test_an_adapter_whose_base_is_not_here_asks_for_it_where_it_matters(base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter", **ADAPTERS["plain"])
    moved = base.rename(tmp_path / "elsewhere")
    found = hf_lora.servable(tmp_path / "adapter")
    assert found.base is None
    assert (found["vllm"].works, found["llama.cpp"].works) == (True, False)
    assert "base=" in " ".join(found["llama.cpp"].reasons)
    assert hf_lora.servable(tmp_path / "adapter", base=moved)["llama.cpp"].works


def test_a_base_that_cannot_be_had_stops_only_what_depends_on_it(base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter", **ADAPTERS["plain"])
    config = tmp_path / "adapter" / "adapter_config.json"
    for name in ("nobody/has-this", "no\\name", "../" * 50, str(tmp_path / "gone"), "x" * 10_000):
        said = json.loads(config.read_text())
        config.write_text(json.dumps(said | {"base_model_name_or_path": name}))
        for number, client in enumerate(("peft", "vllm", "mlx")):
            out = tmp_path / f"{len(name)}-{number}"
            assert hf_lora.export(tmp_path / "adapter", out, client).files
        with pytest.raises(hf_lora.UnsupportedAdapterError, match="base="):
            hf_lora.export(tmp_path / "adapter", tmp_path / "out", "llama.cpp")
        assert hf_lora.servable(tmp_path / "adapter").base is None


def test_no_code_of_a_bases_own_is_run(base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter", **ADAPTERS["plain"])
    config = json.loads((base / "config.json").read_text())
    strange = {"model_type": "strange", "auto_map": {"AutoConfig": "configuration.Strange"}}
    (base / "config.json").write_text(json.dumps(config | strange))
    (base / "configuration.py").write_text("raise SystemExit('ran')")
    assert hf_lora.servable(tmp_path / "adapter").base is None
    with pytest.raises(hf_lora.BaseLoadError, match="cannot be read"):
        hf_lora.servable(tmp_path / "adapter", base=base)


def test_what_is_refused_leaves_nothing(base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter", **ADAPTERS["plain"])
    adapter = tmp_path / "adapter"
    there = sorted(os.listdir(tmp_path))
    with pytest.raises(hf_lora.ConfigError, match=r"no client 'tgi'; there are peft, vllm"):
        hf_lora.export(adapter, tmp_path / "out", "tgi")
    with pytest.raises(hf_lora.ConfigError, match="'int8' is none of float32"):
        hf_lora.export(adapter, tmp_path / "out", "mlx", dtype="int8")
    with pytest.raises(hf_lora.SaveError, match="is not empty"):
        hf_lora.export(adapter, adapter, "mlx")
    with pytest.raises(hf_lora.BaseLoadError, match="no model's folder"):
        hf_lora.export(adapter, tmp_path / "out", "mlx", base=tmp_path)
    with pytest.raises(hf_lora.AdapterFileError):
        hf_lora.export(tmp_path / "nothing", tmp_path / "out", "mlx")
    assert sorted(os.listdir(tmp_path)) == there


def test_what_a_killed_process_left_is_taken_away(base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter", **ADAPTERS["plain"])
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new" / "adapters.safetensors").write_bytes(b"half")
    hf_lora.export(tmp_path / "adapter", tmp_path / "out", "peft")
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert not (tmp_path / ".out.new").exists()


def test_equal_calls_write_equal_bytes(base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter", **ADAPTERS["with overrides"])
    for client in ("peft", "vllm", "llama.cpp", "mlx"):
        for number in "12":
            hf_lora.export(tmp_path / "adapter", tmp_path / client / number, client)
        for name in os.listdir(tmp_path / client / "1"):
            one, two = (tmp_path / client / number / name for number in "12")
            assert one.read_bytes() == two.read_bytes(), name


def test_the_command(run: Run, base: Path, tmp_path: Path):
    made(base, tmp_path / "adapter", **ADAPTERS["plain"])
    text = run("export", tmp_path / "adapter").stdout
    assert "mlx: yes" in text
    assert "kohya: no" in text
    out = tmp_path / "out"
    found = json.loads(
        run("export", tmp_path / "adapter", "--client", "mlx", "-o", out, "--json").stdout
    )
    assert found["files"] == ["adapter_config.json", "adapters.safetensors"]
    assert (
        "is not empty"
        in run("export", tmp_path / "adapter", "-c", "peft", "-o", out, code=1).stderr
    )
    run("export", tmp_path / "adapter", "--client", "mlx", code=2)
