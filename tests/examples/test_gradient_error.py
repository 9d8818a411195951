"""The study of gradients: equal states for all arms, a file that is gone on with, and its table."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from examples.benchmarks import gradient_error, stability
from examples.benchmarks.stability import ARMS
from hf_lora.functional import composed
from hf_lora.layers import fusing
from tests.examples.test_stability import tiny


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_error, "TASKS", {"tiny": tiny})
    monkeypatch.setattr(gradient_error, "STATES", (1, 2))
    # arms set these; set them back
    monkeypatch.setattr(composed, "FEW_ROWS", composed.FEW_ROWS)
    monkeypatch.setattr(fusing, "update_type", fusing.update_type)


def test_every_arm_is_compared_at_the_same_states(tmp_path: Path):
    out = tmp_path / "states.jsonl"
    gradient_error.run(out, tasks="tiny", starts=1)
    whole = out.read_text()
    lines = stability.read([out])
    assert [(line["seed"], line["step"]) for line in lines] == [(0, 1), (0, 2)]
    for line in lines:
        for arm in ARMS:
            assert 1e-4 < line[arm]["all"] < 0.2
    gradient_error.run(out, tasks="tiny", starts=1)
    assert out.read_text() == whole
    out.write_text(whole.splitlines(keepends=True)[0])
    gradient_error.run(out, tasks="tiny", starts=1)
    assert out.read_text() == whole


def test_the_distance_is_zero_in_float32():
    bfloat16 = tiny()
    task = dataclasses.replace(bfloat16, base=lambda: bfloat16.base().float())
    of = gradient_error.models(task)
    for _, state, batch in gradient_error.states(task, 0, 1e-3):
        found = gradient_error.compared(of, state, batch)
        assert all(found[arm]["all"] < 1e-5 for arm in ("peft", "composed", "fused"))


def test_the_table_compares_with_peft_at_equal_states():
    def line(step: int, far: float) -> dict[str, Any]:
        arms = {arm: {"all": far, "median": far} for arm in ARMS}
        return {"task": "one", "step": step, **arms, "fused": {"all": 2 * far, "median": far}}

    peft, *_, fused = gradient_error.table([line(1, 0.01), line(2, 0.04)])[2:]
    assert peft == "| one | peft | 2 | 0.0200 | 0.0400 |  |"
    assert fused == "| one | fused | 2 | 0.0400 | 0.0800 | 2.00 (2.00 to 2.00) |"
