"""Adapter folders that every later hf_lora must be able to load, and how a set of them is written.

``python -m tests.files.kept_folders NAME`` writes the set NAME with the hf_lora that is installed.
A set is never written again: what it is there for is that an older hf_lora wrote it.
"""

import json
import sys
from pathlib import Path

import torch

import hf_lora
from tests import tiny

KEPT = Path(__file__).parent / "kept"
ANSWERS = "answers.json"


def _plain() -> tiny.Net:
    return tiny.adapted()


def _overrides_and_head() -> tiny.Net:
    return tiny.adapted(
        rslora=True,
        dropout=0.1,
        overrides={
            r"layers\.0\.v_proj": {"r": 4, "alpha": 2.0},
            r"layers\.1\..*": {"dropout": 0.0},
        },
        train=["head"],
        exclude=[r"layers\.1\.q_proj"],
    )


def _named_beside() -> tiny.Net:
    model = tiny.adapted()
    hf_lora.add_adapter(model, "other", targets=["v_proj"], r=3, dtype="bfloat16", init="gaussian")
    tiny.scramble(model, seed=7)
    return model


FOLDERS = {
    "plain": _plain,
    "overrides_and_head": _overrides_and_head,
    "named_beside": _named_beside,
}


def answers_of(model: tiny.Net) -> dict[str, list[list[float]]]:
    """Return what the model answers with each of its adapters."""
    found = {}
    for name in hf_lora.adapters(model):
        with hf_lora.use_adapter(model, name):
            found[name] = tiny.answers(model).tolist()
    return found


def write(name: str) -> None:
    """Write the set ``name``: every folder, and what its model answered."""
    torch.manual_seed(0)
    for folder, make in FOLDERS.items():
        model = make()
        hf_lora.save(model, KEPT / name / folder)
        (KEPT / name / folder / ANSWERS).write_text(json.dumps(answers_of(model)) + "\n")


if __name__ == "__main__":
    write(sys.argv[1])
