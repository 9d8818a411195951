"""The fields of ``adapter_config.json`` that we write: what readers ask for, and what differs."""

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest

from tests import tiny
from tests.files import edit

# LoraConfig of PEFT 0.5, the oldest that stops at a field which it does not know.
IN_PEFT_05 = {
    "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "modules_to_save", "peft_type", "r", "revision", "target_modules", "task_type",
}  # fmt: skip
# What some readers take without asking whether it is there (LoRAX, llama.cpp's first converter).
ASKED_FOR = {
    "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha",
    "peft_type", "r", "target_modules",
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({}, set()),
        ({"rslora": True}, {"use_rslora"}),
        ({"dropout": 0.1}, {"lora_dropout"}),
        ({"overrides": {"v_proj": {"r": 1}}}, {"rank_pattern"}),
        ({"overrides": {"v_proj": {"alpha": 1.0}}}, {"alpha_pattern"}),
        ({"train": ["head"]}, {"modules_to_save"}),
    ],
    ids=lambda value: "-".join(value) or "plain",
)
def test_only_what_is_asked_for_or_differs(tmp_path: Path, fields: Any, more: set[str]):
    tiny.saved(tmp_path, **fields)
    written = edit.read_config(tmp_path)
    assert written.keys() == ASKED_FOR | more
    defaults = {f.name: f.default for f in dataclasses.fields(peft.LoraConfig)}
    assert not [name for name in more if written[name] == defaults[name]]


def test_an_old_peft_knows_every_field_of_a_plain_adapter(tmp_path: Path):
    tiny.saved(tmp_path, train=["head"], dropout=0.1)
    assert edit.read_config(tmp_path).keys() <= IN_PEFT_05
