"""Parameter groups in the plain Trainer: the documented line, the schedule, resume to the bit."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

import hf_lora
from tests.integrations import training
from tests.integrations.training import CHECKPOINT, Run, adapter_tensors, base_tensors, run, same

LR, RATIO, STEPS, WARMUP = 1e-2, 16.0, 8, 2
TRAINED = {"train": ["lm_head", "norm"]}


def model(seed: int = 1) -> Any:
    return training.wrapped(seed, fields={"attention_dropout": 0.1}, **TRAINED)


def groups(made: Any, **numbers: float) -> list[dict[str, Any]]:
    return hf_lora.optimizer_groups(made, **{"lr": LR, "b_lr_ratio": RATIO, **numbers})


def by_class(made: Any, **numbers: float) -> Any:
    """The Trainer with the line that the README shows."""
    return functools.partial(
        Trainer,
        optimizer_cls_and_kwargs=(
            torch.optim.AdamW,
            {"params": groups(made, **numbers), "fused": True},
        ),
    )


def by_object(made: Any, **numbers: float) -> Any:
    """The Trainer with an optimizer that was made before."""
    optimizer = torch.optim.AdamW(groups(made, **numbers), fused=True)
    return functools.partial(Trainer, optimizers=(optimizer, None))


class Rates(TrainerCallback):
    """Keeps each group's learning rate, as each step finds it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.seen.append({group["name"]: group["lr"] for group in groups})


@pytest.fixture(scope="module")
def rates() -> Rates:
    return Rates()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, rates: Rates) -> Run:
    made = model()
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(folder, model=made, cls=by_class(made, weight_decay=0.1), callbacks=[rates])


def optimizer_state(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The state of each tensor, flat, and the groups, of the last checkpoint."""
    saved = torch.load(folder / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    flat = {f"{at} {k}": t for at, state in saved["state"].items() for k, t in state.items()}
    return flat, saved["param_groups"]


def test_the_schedule_scales_every_group(uninterrupted: Run, rates: Rates):
    """Two steps of warm-up, then half a cosine to zero, A's rate and B's alike."""
    names = ["lora_A", "lora_B", "trained", "trained_no_decay"]
    assert len(rates.seen) == STEPS
    for step, seen in enumerate(rates.seen):
        done = (step - WARMUP) / (STEPS - WARMUP)
        factor = step / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * done))
        wanted = [LR * factor, LR * RATIO * factor, LR * factor, LR * factor]
        assert seen == pytest.approx(dict(zip(names, wanted, strict=True)))


def test_the_rate_that_is_logged_is_that_of_a(uninterrupted: Run, rates: Rates):
    logged = [
        log["learning_rate"]
        for log in uninterrupted.trainer.state.log_history
        if "learning_rate" in log
    ]
    assert logged == pytest.approx([seen["lora_A"] for seen in rates.seen])


def test_everything_was_trained_and_the_base_was_not(uninterrupted: Run):
    start, end = adapter_tensors(model()), adapter_tensors(uninterrupted.model)
    assert all(not torch.equal(start[key], end[key]) for key in start)
    assert same(base_tensors(uninterrupted.model), uninterrupted.base_before)
    assert training.files(uninterrupted.folder / "checkpoint-4") == CHECKPOINT


def test_a_resumed_run_is_equal_to_the_bit(uninterrupted: Run, tmp_path: Path):
    torch.manual_seed(12345)
    other = model(seed=99)
    assert not same(adapter_tensors(other), adapter_tensors(model()))
    checkpoint = str(uninterrupted.folder / "checkpoint-4")
    resumed = run(tmp_path, checkpoint, model=other, cls=by_class(other, weight_decay=0.1))
    assert same(adapter_tensors(resumed.model), adapter_tensors(uninterrupted.model))
    for name in ("adapter_model.safetensors", "scheduler.pt"):
        first, second = (
            (folder / f"checkpoint-{STEPS}" / name).read_bytes()
            for folder in (resumed.folder, uninterrupted.folder)
        )
        assert first == second
    state, saved_groups = optimizer_state(resumed.folder)
    expected_state, expected_groups = optimizer_state(uninterrupted.folder)
    assert state
    assert same(state, expected_state)
    assert saved_groups == expected_groups


def test_an_optimizer_made_before_trains_the_same(uninterrupted: Run, tmp_path: Path):
    made = model()
    trained = run(tmp_path, model=made, cls=by_object(made, weight_decay=0.1))
    assert same(adapter_tensors(trained.model), adapter_tensors(uninterrupted.model))


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trainer's own optimizer, on the same model."""
    return run(tmp_path_factory.mktemp("default"), model=model(), weight_decay=0.1)


class TestWithoutARatio:
    """With a ratio of 1 and Trainer's own numbers, it is Trainer's own training."""

    def test_trainers_default_is_the_fused_adamw_on_the_cpu_too(self, default: Run):
        optimizer: Any = default.trainer.optimizer
        inner = optimizer.optimizer  # accelerate's wrapper holds it
        assert type(inner) is torch.optim.AdamW
        assert inner.defaults["fused"] is True

    def test_the_weights_are_equal_to_the_bit(self, default: Run, tmp_path: Path):
        made = model()
        ours = run(tmp_path, model=made, cls=by_class(made, b_lr_ratio=1.0, weight_decay=0.1))
        assert same(adapter_tensors(ours.model), adapter_tensors(default.model))

    def test_a_ratio_makes_a_difference(self, default: Run, uninterrupted: Run):
        assert not same(adapter_tensors(uninterrupted.model), adapter_tensors(default.model))
