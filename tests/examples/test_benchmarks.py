"""The benchmarks run, count exactly, and their arms compute the same; times are not tested."""

from pathlib import Path

import pytest
import torch

from examples.benchmarks import report, saved_bytes
from examples.benchmarks.arms import ARMS, Work, arm, forward
from hf_lora.layers.fusing import update_type

TINY = Work(hidden=192, ffn=256, layers=2, tokens=200, r=4)
"""More rows than `composed.FEW_ROWS`, so that the fused path is taken."""


def gradients(name: str, work: Work, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the gradients of one arm with weights and factors as `work` has them."""
    model = arm(name, work).to(dtype) if dtype == torch.float64 else arm(name, work)
    torch.manual_seed(4)
    embedded = torch.randn(1, work.tokens, work.hidden, dtype=torch.bfloat16)
    flow = torch.randn(1, work.tokens, work.hidden, dtype=torch.bfloat16)
    loss, inputs = forward(model, embedded.to(dtype), None, flow.to(dtype))
    loss.backward()
    found = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad.double()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    assert inputs.grad is not None
    return found | {"input": inputs.grad.double()}


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert found.keys() == exact.keys()
    return max(float((found[key] - exact[key]).norm() / exact[key].norm()) for key in exact)


def test_gradients_in_bfloat16_are_as_good_as_peft_s():
    exact = gradients("unfused", TINY, torch.float64)
    ours = error(gradients("hf_lora", TINY, torch.bfloat16), exact)
    theirs = error(gradients("peft", TINY, torch.bfloat16), exact)
    assert theirs > 1e-4
    assert ours < 1.5 * theirs


def test_all_arms_do_the_same_work():
    work = Work(**{**vars(TINY), "dtype": torch.float32})
    found = {name: gradients(name, work, torch.float32) for name in ARMS[1:]}
    for name in ARMS[2:]:
        assert error(found[name], found["peft"]) < 1e-5


def adapter_numbers(work: Work) -> float:
    """Return how many numbers the adapter of one layer has."""
    trained = [p.numel() for p in arm("hf_lora", work).parameters() if p.requires_grad]
    return sum(trained) / work.layers


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_bytes_are_those_of_the_formulas(dtype: torch.dtype, dropout: float):
    work = Work(**{**vars(TINY), "dtype": dtype, "dropout": dropout})
    counts = saved_bytes.measure(work)
    above = {name: counts[name].per_token - counts["frozen"].per_token for name in ARMS[1:]}
    h, f, r = work.hidden, work.ffn, work.r
    if dropout:  # research: PEFT keeps the dropped x and its noise, we one bit an element, and h
        assert above["peft"] == 8 * (6 * h + f) + 28 * r
        assert above["hf_lora"] == (6 * h + f) // 8 + 7 * r * dtype.itemsize
    else:
        per = {torch.bfloat16: 4 * (6 * h + f), torch.float32: 4 * (2 * h + f)}[dtype]
        assert above["peft"] == per + 28 * r
        assert above["hf_lora"] == 0
    once = counts["hf_lora"].once - counts["frozen"].once
    size = update_type("cpu", dtype).itemsize
    assert once <= adapter_numbers(work) * size + 7 * work.layers * 64


TINY_ROW = ["--hidden", "192", "--ffn", "256", "--layers", "1", "--tokens", "8"]


def test_a_row_of_the_report_is_measured_in_a_process_of_its_own():
    times = report.ran("train_step", [*TINY_ROW, "--rounds", "1"])["arms"]
    assert tuple(times) == ARMS
    for one in times.values():
        assert one["ratio"] == pytest.approx(one["seconds"] / times["frozen"]["seconds"])
    saved = report.ran("saved_bytes", TINY_ROW)
    assert saved["peft"]["per_token"] > saved["frozen"]["per_token"] > 0


def test_a_step_is_taken_apart_into_what_makes_it_up():
    found = report.ran("limits", [*TINY_ROW, "--rounds", "2"])
    seconds = {name: one["seconds"] for name, one in found["arms"].items()}
    kinds = found["kinds"]
    assert kinds["frozen"].keys() == kinds["hf_lora"].keys()
    assert seconds["limit"] == pytest.approx(seconds["frozen"] + seconds["products"])
    assert seconds["limit of hf_lora"] == pytest.approx(seconds["limit"] + seconds["promises"])
    # of one round, as with --rounds 2; medians of several need not add up
    assert sum(kinds["frozen"].values()) == pytest.approx(1)
    assert kinds["hf_lora"]["products"] > 0


def test_the_report_is_written_from_what_was_measured(tmp_path: Path):
    row = {name: {"seconds": 1.0 + i, "ratio": 1.5 + i} for i, name in enumerate(ARMS)}
    saved = {name: {"per_token": 1000.0 * (1 + i), "once": 0.0} for i, name in enumerate(ARMS)}
    seconds = {"frozen": 2.0, "hf_lora": 2.5, "limit": 2.25, "limit of hf_lora": 2.4}
    limit = {
        "arms": {name: {"seconds": each, "ratio": each / 2} for name, each in seconds.items()},
        "kinds": {
            "frozen": {"products": 0.75, "rest": 0.25},
            "hf_lora": {"products": 0.85, "rest": 0.3},
        },
    }
    runs = [
        {"library": name, "seed": 0, "held_out": 0.5, "losses": [1.0] * 60}
        for name in report.COLORS
    ]
    report.write(tmp_path, dict.fromkeys(report.ROWS, row), {"bf16": saved}, {"one": limit}, runs)
    text = (tmp_path / "README.md").read_text()
    assert "| 1.00 (1.50) | 2.00 (2.50) | 3.00 (3.50) | 4.00 (4.50) | 5.00 (5.50) | 1.15 |" in text
    assert "| bf16 | 1,000 | +1,000 | +2,000 | +3,000 | +4,000 |" in text
    assert "| peft | 0 | 1.000 | 0.500 |" in text
    assert (tmp_path / "report.png").stat().st_size > 1000
    assert "| **limit** | 1.125 (1.125) |" in text
    assert "| **limit of hf_lora** | 1.200 (1.200) |" in text
    assert "| products | +0.100 |" in text
    assert "| rest | +0.050 |" in text
