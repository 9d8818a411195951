"""The plain Trainer on a wrapped model: checkpoints, resume to the bit, best model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.utils import logging

import hf_lora
from tests.integrations import training
from tests.integrations.training import CHECKPOINT, Run, adapter_tensors, base_tensors, run, same


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """8 steps of 2 batches, an epoch being 6 steps, with dropout in model and adapter."""
    model = training.wrapped(fields={"attention_dropout": 0.1})
    return run(tmp_path_factory.mktemp("uninterrupted"), model=model)


@pytest.fixture(scope="module")
def resumed(uninterrupted: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Steps 5 to 8, from the checkpoint at step 4, by a model that began elsewhere."""
    torch.manual_seed(12345)
    model = training.wrapped(seed=99, fields={"attention_dropout": 0.1})
    assert not same(adapter_tensors(model), adapter_tensors(training.wrapped()))
    folder = tmp_path_factory.mktemp("resumed")
    return run(folder, str(uninterrupted.folder / "checkpoint-4"), model=model)


class TestCheckpoints:
    def test_a_checkpoint_holds_these_files(self, uninterrupted: Run):
        assert training.checkpoints(uninterrupted.folder) == ["checkpoint-4", "checkpoint-8"]
        for name in ("checkpoint-4", "checkpoint-8"):
            assert training.files(uninterrupted.folder / name) == CHECKPOINT

    def test_its_tensors_are_the_adapter_and_nothing_of_the_base(self, uninterrupted: Run):
        last = training.saved(uninterrupted.folder / "checkpoint-8")
        assert same(last, training.in_file_names(uninterrupted.model))
        assert len(last) == 2 * 3 * 2  # layers, targets, factors
        assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in last)

    def test_the_base_was_not_written(self, uninterrupted: Run):
        assert same(base_tensors(uninterrupted.model), uninterrupted.base_before)

    def test_the_adapter_was_trained(self, uninterrupted: Run):
        start = adapter_tensors(training.wrapped())
        end = adapter_tensors(uninterrupted.model)
        assert all(not torch.equal(start[key], end[key]) for key in start)
        losses = [log["loss"] for log in uninterrupted.trainer.state.log_history if "loss" in log]
        assert losses[-1] < losses[0]

    def test_save_model_writes_the_adapter(self, uninterrupted: Run, tmp_path: Path):
        uninterrupted.trainer.save_model(str(tmp_path))
        assert training.files(tmp_path) == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "training_args.bin",
        }
        assert same(training.saved(tmp_path), training.in_file_names(uninterrupted.model))

    def test_save_total_limit_keeps_the_last(self, tmp_path: Path):
        run(tmp_path, save_steps=1, save_total_limit=2, max_steps=4)
        assert training.checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-4"]
        assert training.files(tmp_path / "checkpoint-3") == CHECKPOINT

    def test_a_checkpoint_loads_as_an_adapter(self, uninterrupted: Run):
        fresh = training.llama(attention_dropout=0.1)
        hf_lora.load(fresh, uninterrupted.folder / "checkpoint-8")
        x = torch.arange(1, 9)[None]
        uninterrupted.model.eval()
        with torch.no_grad():
            assert torch.equal(fresh.eval()(x).logits, uninterrupted.model(x).logits)


def equal(a: Any, b: Any) -> bool:
    """Equal in every bit, whatever is nested in it."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


class TestResume:
    """From the middle of an epoch over its end, against the run that was never interrupted."""

    def test_the_weights_are_equal(self, uninterrupted: Run, resumed: Run):
        assert resumed.trainer.state.global_step == 8
        assert same(adapter_tensors(resumed.model), adapter_tensors(uninterrupted.model))
        assert same(base_tensors(resumed.model), resumed.base_before)

    def test_the_saved_file_is_equal_to_the_byte(self, uninterrupted: Run, resumed: Run):
        name = "checkpoint-8/adapter_model.safetensors"
        assert (resumed.folder / name).read_bytes() == (uninterrupted.folder / name).read_bytes()

    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_the_rest_of_the_state_is_equal(self, uninterrupted: Run, resumed: Run, name: str):
        first, second = (
            torch.load(each.folder / "checkpoint-8" / name, weights_only=False)
            for each in (uninterrupted, resumed)
        )
        assert first
        assert equal(first, second)

    def test_every_step_logged_the_same(self, uninterrupted: Run, resumed: Run):
        first, second = (
            [log for log in each.trainer.state.log_history if "loss" in log]
            for each in (uninterrupted, resumed)
        )
        assert len(first) == 8
        assert first == second

    def test_dropout_was_at_work(self, uninterrupted: Run, tmp_path: Path):
        """Else equality of the random states would say nothing about it."""
        other = training.wrapped(fields={"attention_dropout": 0.0}, dropout=0.0)
        assert not same(
            adapter_tensors(run(tmp_path, model=other).model), adapter_tensors(uninterrupted.model)
        )

    def test_the_last_checkpoint_is_found_by_itself(self, uninterrupted: Run, tmp_path: Path):
        folder = tmp_path / "again"
        shutil.copytree(uninterrupted.folder / "checkpoint-4", folder / "checkpoint-4")
        model = training.wrapped(seed=99, fields={"attention_dropout": 0.1})
        resumed = run(folder, True, model=model)  # type: ignore[arg-type]
        assert same(adapter_tensors(resumed.model), adapter_tensors(uninterrupted.model))


SCORES = {2: 0.1, 4: 0.9, 6: 0.5, 8: 0.2}
"""Step to the metric that is to be highest: the best is neither the last nor the first."""


def scored(folder: Path, **fields: Any) -> Run:
    """A run that evaluates, saves and scores every second step."""
    scores = iter(SCORES.values())
    return run(
        folder,
        eval_dataset=training.tokens(4, seed=8),
        compute_metrics=lambda _: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        **fields,
    )


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return scored(tmp_path_factory.mktemp("best"))


class TestBestModel:
    def test_the_best_is_not_the_last(self, best: Run):
        assert Path(str(best.trainer.state.best_model_checkpoint)).name == "checkpoint-4"
        last = training.saved(best.folder / "checkpoint-8")
        assert not same(last, training.saved(best.folder / "checkpoint-4"))

    def test_the_model_has_its_weights(self, best: Run):
        there = training.saved(best.folder / "checkpoint-4")
        assert same(training.in_file_names(best.model), there)
        assert same(base_tensors(best.model), best.base_before)

    def test_a_limit_of_one_keeps_the_best(self, tmp_path: Path):
        limited = scored(tmp_path, save_total_limit=1)
        assert training.checkpoints(tmp_path) == ["checkpoint-4"]
        there = training.saved(tmp_path / "checkpoint-4")
        assert same(training.in_file_names(limited.model), there)

    def test_a_best_checkpoint_that_is_gone_ends_no_run(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        """Trainer says that it is not there, and the run ends with its last weights."""

        class Remove(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 8:
                    shutil.rmtree(tmp_path / "checkpoint-4")

        before = logging.get_verbosity()
        logging.set_verbosity_warning()
        logging.enable_propagation()
        try:
            result = scored(tmp_path, callbacks=[Remove()])
        finally:
            logging.disable_propagation()
            logging.set_verbosity(before)
        assert "Could not locate the best model" in caplog.text
        last = training.saved(tmp_path / "checkpoint-8")
        assert same(training.in_file_names(result.model), last)

    def test_save_strategy_best_by_the_loss(self, tmp_path: Path):
        """With the real loss on held-out data, whichever step is best."""
        result = run(
            tmp_path,
            eval_dataset=training.tokens(4, seed=8),
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="best",
            load_best_model_at_end=True,
            learning_rate=0.02,
        )
        logs = [log for log in result.trainer.state.log_history if "eval_loss" in log]
        lowest = min(logs, key=lambda log: log["eval_loss"])
        assert lowest["step"] not in (1, 8)
        assert result.trainer.evaluate()["eval_loss"] == pytest.approx(lowest["eval_loss"], abs=0)
