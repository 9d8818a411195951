"""The study of stability: equal starts, a file that is gone on with, and a table that counts."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.benchmarks import stability
from examples.benchmarks.stability import ARMS, STEPS, Task
from hf_lora.functional import composed
from hf_lora.layers import fusing
from tests.integrations import training


def tiny() -> Task:
    """A tiny Llama in bfloat16 and random sentences."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    train, test = training.tokens(12), training.tokens(4, seed=8)
    return Task(
        lambda: training.llama().bfloat16(), ["q_proj", "down_proj"], train, test, collate, 2
    )


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "TASKS", {"tiny": tiny})
    monkeypatch.setattr(stability, "STEPS", 3)
    # arms set these; set them back
    monkeypatch.setattr(composed, "FEW_ROWS", composed.FEW_ROWS)
    monkeypatch.setattr(fusing, "update_type", fusing.update_type)


def factors(arm: str, seed: int) -> list[torch.Tensor]:
    model = stability.adapted(arm, tiny(), seed)
    return [p.float() for p in model.parameters() if p.requires_grad]


def test_all_arms_start_from_the_same_factors():
    ours = factors("fused", 3)
    assert len(ours) == 8
    assert not all(map(torch.equal, ours, factors("fused", 4)))
    for arm in ARMS:
        of_arm = factors(arm, 3)
        wanted = [p.bfloat16().float() for p in ours] if arm == "peft16" else ours
        assert all(map(torch.equal, of_arm, wanted))


def test_a_study_goes_on_behind_a_line_that_was_cut_off(tmp_path: Path):
    out = tmp_path / "runs.jsonl"
    stability.run(out, tasks="tiny", starts=1)
    whole = out.read_text()
    runs = stability.read([out])
    assert {(r["rate"], r["arm"]) for r in runs} == {(x, a) for x in stability.RATES for a in ARMS}
    for each in runs:
        assert len(each["norms"]) == 3
        assert math.isfinite(each["trained"])
        assert math.isfinite(each["held_out"])
    out.write_text(whole[:-40])
    stability.run(out, tasks="tiny", starts=1)
    again = stability.read([out])
    timeless = [{**r, "seconds": 0} for r in again], [{**r, "seconds": 0} for r in runs]
    assert timeless[0] == timeless[1]
    before = out.read_text()
    stability.run(out, tasks="tiny", starts=1)
    assert out.read_text() == before


def test_runs_of_another_arithmetic_are_kept_and_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "runs.jsonl"
    stability.run(out, tasks="tiny", rates="1e-3", starts=1)
    monkeypatch.setattr(stability, "ARITHMETIC", stability.ARITHMETIC + 1)
    stability.run(out, tasks="tiny", rates="1e-3", starts=2)
    runs = stability.read([out])
    assert [r["seed"] for r in runs] == [0] * 4 + [0] * 4 + [1] * 4
    capsys.readouterr()
    for arithmetic in (stability.ARITHMETIC - 1, stability.ARITHMETIC):
        stability.report([out], arithmetic)
        starts = arithmetic - stability.ARITHMETIC + 2
        assert capsys.readouterr().out.count(f"| {starts} | 0% ") == len(ARMS)


def test_the_fused_arm_computes_in_16_bits_on_every_processor():
    stability.adapted("fused", tiny(), 0)
    assert fusing.update_type("cpu", torch.bfloat16) == torch.bfloat16


WIDENED = """
import torch
from examples.benchmarks import wide_products

def products():
    torch.manual_seed(0)
    x, w, c = (torch.randn(40, 40).bfloat16() for _ in range(3))
    into = torch.empty(40, 40).bfloat16()
    return [
        torch.mm(x, w), torch.mm(x, w, out=into.clone()), torch.bmm(x[None], w[None]),
        torch.addmm(c[0], x, w, beta=0.5, alpha=2), torch.addmm(c, x, w, out=into.clone()),
        c.clone().addmm_(x, w), x.float() @ w.float(), torch.nn.functional.linear(x, w, c[0]),
    ]

before = products()
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False
assert wide_products.now() == "own"
wide_products.install()
wide_products.install()
assert wide_products.now() == "widened"
for old, new in zip(before, products(), strict=True):
    assert new.dtype == old.dtype
    eps = torch.finfo(old.dtype).eps
    assert ((new - old).abs() <= 1.5 * eps * old.abs() + 1e-4).all()
    assert (new != old).float().mean() < 0.02 or old.dtype == torch.float32
"""


def test_widened_products_are_the_processor_s_own_up_to_rounding():
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", WIDENED], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def made(arm: str, seed: int, held_out: float, norm: float) -> dict[str, Any]:
    return {
        "task": "one",
        "rate": 0.001,
        "seed": seed,
        "arm": arm,
        "held_out": held_out,
        "norms": [1.0] * (STEPS - 1) + [norm],
    }


def test_the_table_counts_outbreaks_and_compares_equal_starts(tmp_path: Path):
    runs = [made(arm, seed, 1.5 + seed / 10, 3.0) for arm in ARMS for seed in range(4)]
    for seed in range(4):  # the last arm: always 0.25 worse, and once it breaks out
        runs[-4 + seed] = made(ARMS[-1], seed, 1.75 + seed / 10, 50.0 if seed == 2 else 3.0)
    alone = made("peft", 9, 9.0, 99.0)  # a start that the other arms have not run yet
    file = tmp_path / "runs.jsonl"
    file.write_text("\n".join(json.dumps(each) for each in [*runs, alone]))
    peft, *_, last = stability.table(stability.read([file]))[2:]
    assert peft == (
        "| one, 0.001 | peft | 4 | 0% (0% to 49%) | 1.650 (1.550 to 1.750) | 1.800 |  |"
    )
    assert "| 25% (5% to 70%) |" in last
    assert "| 2.050 | 0.250 (0.250 to 0.250) |" in last


def test_a_run_that_ended_in_nan_is_the_worst_and_an_outbreak():
    runs = [made(arm, 0, 1.5, 3.0) for arm in ARMS]
    runs[-1] = made(ARMS[-1], 0, math.nan, math.nan)
    last = stability.table(json.loads(json.dumps(runs)))[-1]
    assert "| 100% (21% to 100%) | inf | inf | inf |" in last
