"""The benchmarks run, count exactly, and their arms compute the same; times are not tested."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from examples.benchmarks import report, saved_bytes, train_step
from examples.benchmarks.arms import ARMS, Work, arm, forward

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
    if dropout:  # research: PEFT keeps the dropped x and its noise, we one byte an element
        assert above["peft"] == 8 * (6 * h + f) + 28 * r
        assert above["hf_lora"] == 6 * h + f + 7 * r * dtype.itemsize
    else:
        per = {torch.bfloat16: 4 * (6 * h + f), torch.float32: 4 * (2 * h + f)}[dtype]
        assert above["peft"] == per + 28 * r
        assert above["hf_lora"] == 0
    once = counts["hf_lora"].once - counts["frozen"].once
    assert once <= adapter_numbers(work) * dtype.itemsize + 7 * work.layers * 64


def test_one_command_measures_a_step():
    runner = CliRunner()
    app = train_step.typer.Typer()
    app.command()(train_step.main)
    tiny = ["--hidden", "192", "--ffn", "256", "--layers", "1", "--tokens", "8", "--rounds", "1"]
    result = runner.invoke(app, tiny)
    assert result.exit_code == 0, result.output
    found = report.figures(result.output)
    assert tuple(found) == ARMS
    assert all(milliseconds > 0 for milliseconds in found.values())


def test_the_report_is_written_from_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = "a row\n" + "".join(
        f"  {name}  {i + 1},000.5 ms  1\n" for i, name in enumerate(ARMS)
    )
    monkeypatch.setattr(report, "ran", lambda module, arguments: measured)
    runs = [
        {"library": name, "seed": 0, "held_out": 0.5, "losses": [1.0] * 60} for name in ARMS[1:]
    ]
    curves = tmp_path / "curves.json"
    curves.write_text(report.json.dumps(runs))
    report.main(tmp_path, curves)
    text = (tmp_path / "README.md").read_text()
    assert "| 1.00 | 2.00 | 3.00 | 4.00 | 5.00 | 1.15 |" in text
    assert "| bf16 | 1,000 | +1,000 | +2,000 | +3,000 | +4,000 |" in text
    assert "| peft | 0 | 1.000 | 0.500 |" in text
    assert (tmp_path / "report.png").stat().st_size > 1000
