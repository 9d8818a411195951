"""``hf-lora merge``: what the library does, from a shell."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_lora
from tests.tiny import scramble
from tests.tiny_base import Run


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = hf_lora.wrap(AutoModelForCausalLM.from_pretrained(base), ["q_proj"], r=2)
    scramble(model)
    hf_lora.save(model, tmp_path / "my-adapter")
    return tmp_path / "my-adapter"


def test_it_merges_into_the_base_that_the_adapter_names(run: Run, adapter: Path, tmp_path: Path):
    said = run("merge", adapter, "-o", tmp_path / "merged", "--verify").stdout
    assert "2 tensors changed" in said
    assert "verified: " in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged") is not None


def test_its_json_is_the_report(run: Run, adapter: Path, base: Path, tmp_path: Path):
    options = ["--json", "--base", base, "--dtype", "float32", "--plot", tmp_path / "lost.png"]
    said = run("merge", f"{adapter}=0.5", "-o", tmp_path / "merged", *options).stdout
    found = json.loads(said)
    assert found == json.loads((tmp_path / "merged" / "hf_lora_merge.json").read_text())
    assert found["adapters"] == {str(adapter): 0.5}
    assert (tmp_path / "lost.png").is_file()
    model = AutoModelForCausalLM.from_pretrained(base)
    hf_lora.merge(hf_lora.load(model, adapter), {"default": 0.5})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(6).view(1, -1)
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_it_can_only_measure(run: Run, adapter: Path, tmp_path: Path):
    said = run("merge", adapter, "-o", tmp_path / "merged", "--dry-run").stdout
    assert "nothing was written" in said
    assert not (tmp_path / "merged").exists()


def test_it_says_why_not(run: Run, adapter: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert "is not empty" in run("merge", adapter, "-o", tmp_path / "full", code=1).stderr
    assert "no factor" in run("merge", f"{adapter}=much", "-o", tmp_path / "out", code=1).stderr
