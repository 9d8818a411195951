"""PEFT is kept from a model that carries our adapters, and from no other."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import hf_lora
from tests.snapshot import snapshot
from tests.tiny import Net, adapted, answers

ROOT = Path(__file__).parents[2]
CONFIG = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def from_pretrained(model: nn.Module, folder: Path) -> None:
    peft.get_peft_model(Net(), CONFIG).save_pretrained(folder)
    peft.PeftModel.from_pretrained(model, str(folder))


@pytest.mark.parametrize(
    "put_on",
    [
        lambda model, _: peft.get_peft_model(model, CONFIG),
        lambda model, _: peft.get_peft_model(model, CONFIG, mixed=True),
        lambda model, _: peft.inject_adapter_in_model(CONFIG, model),
        lambda model, _: peft.get_peft_model(nn.Sequential(model), CONFIG),
        from_pretrained,
    ],
    ids=["get_peft_model", "mixed", "inject", "around", "from_pretrained"],
)
def test_our_model_is_refused_and_left_alone(put_on: Callable, tmp_path: Path):
    model = adapted(targets="q_proj")
    before, expected = snapshot(model), answers(model)
    with pytest.raises(
        hf_lora.StateError, match=r"layers\.0\.q_proj carries an adapter of hf_lora"
    ):
        put_on(model, tmp_path)
    assert snapshot(model) == before
    assert torch.equal(answers(model), expected)


def test_a_plain_model_is_not():
    model = hf_lora.unwrap(adapted())
    expected = answers(model)
    other = peft.get_peft_model(model, CONFIG)
    assert not torch.equal(answers(other), expected)
    assert torch.equal(answers(other.unload()), expected)


def test_peft_may_be_imported_later():
    code = """
import sys
import hf_lora
from tests.tiny import adapted
model = adapted()
assert "peft" not in sys.modules
import peft
try:
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
except hf_lora.StateError:
    print("refused")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", done.stderr
