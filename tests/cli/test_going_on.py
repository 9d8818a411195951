"""Training that stops and goes on: Ctrl-C, more epochs, from an adapter, in several processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_lora
from hf_lora.recipes import sweep
from hf_lora.recipes.history import read_history
from tests.tiny_base import Run

Write = Callable[[str, Any], Path]
ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": f"{word}:", "completion": f" {word[::-1]}"}
    for word in ("rank", "alpha", "model", "matrix", "small", "large", "weight", "train")
]


@pytest.fixture
def recipe(write: Write, base: Path) -> Callable[..., Path]:
    write("rows.jsonl", ROWS)

    def make(name: str = "run.json", **changes: Any) -> Path:
        usual = {"lr": 1e-2, "epochs": 3, "batch_size": 2, "logging_steps": 1}
        content = {
            "base": str(base),
            "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "loss": "completions"},
            "lora": {"r": 4, "dropout": 0.1},
            "trainer": {**usual, **changes.pop("trainer", {})},
            "output": "out",
            **changes,
        }
        return write(name, {key: value for key, value in content.items() if value is not None})

    return make


def result(run: Run, *arguments: Any) -> dict[str, Any]:
    return json.loads(run("train", *arguments, "--json").stdout)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def pressed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Somebody who presses Ctrl-C while a step is being done: `pressed(6)`, or never: None."""
    at: list[int | None] = [None]

    class Pressing(sweep.StopsCleanly):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == at[0]:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sweep, "StopsCleanly", Pressing)

    def press(step: int | None) -> None:
        at[0] = step

    return press


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(
    run: Run, recipe: Any, pressed: Any, tmp_path: Path
):
    path = recipe()
    whole = tmp_path / "whole"
    result(run, path, "-o", whole)
    before = signal.getsignal(signal.SIGINT)
    pressed(6)
    stopped = run("train", path, "--set", "trainer.seed=42", code=130)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped after step 7 of 12; its checkpoint is saved. Go on with:" in stopped.stderr
    again = f"hf-lora train {path} --set trainer.seed=42 --resume"
    assert f"  {again}\n" in stopped.stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    pressed(None)
    assert result(run, *again.split()[2:])["best"]["steps"] == 12
    assert same(weights(tmp_path / "out"), weights(whole))


def test_ctrl_c_with_json_and_in_python(run: Run, recipe: Any, pressed: Any):
    pressed(2)
    stopped = run("train", recipe(), "--json", code=130)
    assert json.loads(stopped.stdout)["error"]["type"] == "KeyboardInterrupt"
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 12"):
        hf_lora.train(recipe(output="other"))


def test_more_epochs_keep_the_optimizer_and_begin_the_schedule_anew(
    run: Run, recipe: Any, tmp_path: Path
):
    path = recipe(trainer={"lr_scheduler_type": "cosine", "warmup_steps": 2})
    first = result(run, path)
    assert first["best"]["steps"] == 12
    before = weights(tmp_path / "out")
    found = result(run, path, "--more", 2)
    assert found["best"]["steps"] == 20
    assert len(found["tries"]) == 1
    history = [row for row in read_history(tmp_path / "out") if "loss" in row]
    rates = [row["learning_rate"] for row in history]
    assert [row["step"] for row in history] == [*range(1, 21)]
    # as Trainer logs them: warmed up in two steps, then falling to nearly nothing, both times
    assert rates[0] == rates[12] == 0.0
    assert rates[2] == rates[14] == pytest.approx(1e-2)
    assert rates[11] < 1e-3
    assert rates[19] < 2e-3
    assert not same(weights(tmp_path / "out"), before)
    state = torch.load(
        tmp_path / "out" / "checkpoints" / "checkpoint-20" / "optimizer.pt", weights_only=True
    )
    assert {int(each["step"]) for each in state["state"].values()} == {20}
    # once more, from there
    assert result(run, path, "--more", 1)["best"]["steps"] == 24


def test_more_epochs_that_are_interrupted_go_on(
    run: Run, recipe: Any, pressed: Any, tmp_path: Path
):
    path = recipe()
    result(run, path)
    result(run, path, "-o", tmp_path / "whole")
    result(run, path, "-o", tmp_path / "whole", "--more", 2)
    pressed(15)
    assert "stopped after step 16 of 20" in run("train", path, "--more", 2, code=130).stderr
    told = run("train", path, "--more", 1, code=1).stderr
    assert "epochs that were added are not done yet; --resume does them" in told
    pressed(None)
    assert result(run, path, "--resume")["best"]["steps"] == 20
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_more_of_steps_and_of_the_best_of_several_rates(run: Run, recipe: Any, tmp_path: Path):
    path = recipe(trainer={"lr": [1e-5, 1e-2], "max_steps": 4})
    first = result(run, path)
    assert first["best"]["learning_rate"] == 1e-2
    found = result(run, path, "--more", 1)
    assert [each["steps"] for each in found["tries"]] == [4, 8]
    assert found["best"]["steps"] == 8


def test_more_of_what_is_not_there(run: Run, recipe: Any, pressed: Any, tmp_path: Path):
    assert "nothing is trained" in run("train", recipe(), "--more", 1, code=1).stderr
    path = recipe(trainer={"save_strategy": "no"})
    result(run, path)
    told = run("train", path, "--more", 1, code=1).stderr
    assert "the last step has no checkpoint" in told
    assert f"continue_from: {tmp_path / 'out'}" in told
    pressed(2)
    path = recipe("b.json", output="b")
    run("train", path, code=130)
    assert "not finished yet; --resume" in run("train", path, "--more", 1, code=1).stderr
    path = recipe(
        "c.json",
        output="c",
        trainer={"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    )
    pressed(None)
    result(run, path)
    assert "no way to begin the schedule" in run("train", path, "--more", 1, code=1).stderr


def test_training_goes_on_from_an_adapter(run: Run, recipe: Any, tmp_path: Path, base: Path):
    first = result(run, recipe())
    path = recipe("on.json", continue_from="out", lora=None, output="on", trainer={"epochs": 1})
    found = result(run, path)
    assert found["best"]["eval_loss"] < first["best"]["eval_loss"]
    shown = json.loads(run("show", tmp_path / "on", "--json").stdout)
    assert {layer["r"] for layer in shown["layers"]} == {4}
    # with a rate of nothing it is the adapter that it began with
    still = recipe("still.json", continue_from="out", lora=None, output="s", trainer={"lr": 1e-30})
    assert result(run, still)["best"]["eval_loss"] == pytest.approx(first["best"]["eval_loss"])
    assert all(
        torch.allclose(tensor, weights(tmp_path / "s")[key])
        for key, tensor in weights(tmp_path / "out").items()
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"continue_from": "absent folder"}, "continue_from: "),
        ({"continue_from": "out", "lora": {"r": 2}}, "the adapter says itself what lora would"),
        ({"continue_from": 7, "lora": None}, "continue_from: 7 is not a folder or an id"),
    ],
)
def test_an_adapter_to_go_on_from_that_is_none(run: Run, recipe: Any, changes: Any, told: str):
    assert told in run("train", recipe(**changes), code=1).stderr


@pytest.mark.slow
# accelerate starts several processes on a CPU by MPI alone
@pytest.mark.parametrize(("launcher", "steps"), [("torchrun", 6), ("accelerate", 12)])
def test_launchers_run_the_command(
    recipe: Any, tmp_path: Path, launcher: str, steps: int, base: Path
):
    path = recipe(trainer={"use_cpu": True})
    words = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "-m", "hf_lora"],
        "accelerate": [
            *("accelerate.commands.launch", "--cpu", "--num_processes", "1"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("-m", "hf_lora"),
        ],
    }[launcher]
    done = subprocess.run(
        [sys.executable, "-m", *words, "train", str(path), "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)  # one document, from one process
    # with two, half as many as alone: each has rows of its own
    assert found["best"]["steps"] == steps
    model = hf_lora.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert hf_lora.adapters(model)
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert len(json.loads((tmp_path / "out" / "training.json").read_text())["tries"]) == 1
