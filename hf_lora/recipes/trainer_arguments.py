"""The recipe's ``trainer`` section: names, types and values that TrainingArguments accepts."""

import dataclasses
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_lora.errors import ConfigError
from hf_lora.recipes.fields import mismatch, report_unknown
from hf_lora.recipes.names import elsewhere
from hf_lora.recipes.recipe import Recipe
from hf_lora.recipes.tasks import TASKS, Task

RATE = "learning_rate"
_OURS = {
    "output_dir": "set output instead",
    "push_to_hub": "set push instead",
    "resume_from_checkpoint": "run with --resume instead",
    "disable_tqdm": "hf-lora shows its own progress",
    "max_length": "set data.max_length instead",
    "model_init_kwargs": "set base instead",
}
_OURS |= dict.fromkeys(
    ("hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_always_push"),
    "set push instead",
)
_OURS["hub_revision"] = "set push instead"


def learning_rates(recipe: Recipe) -> list[float]:
    """Return the learning rates to try, one if the recipe has no list."""
    return _rates(recipe.trainer, TASKS[recipe.task])


def _rates(trainer: Mapping[str, Any], task: Task) -> list[float]:
    said = trainer.get(RATE, task.rate)
    return [float(rate) for rate in (said if isinstance(said, list) else [said])]


def arguments(recipe: Recipe, rate: float, output: Path) -> TrainingArguments:
    """Return transformers' arguments, or TRL's, for training at one learning rate."""
    task = TASKS[recipe.task]
    longest = {"max_length": recipe.data.max_length} if recipe.data.max_length else {}
    return _arguments(task, {**recipe.trainer, **(longest if task.trl else {})}, rate, output)


def _arguments(
    task: Task, trainer: Mapping[str, Any], rate: float, output: Path
) -> TrainingArguments:
    usual: dict[str, Any] = {
        # pinned memory is for copying to an accelerator; without one torch warns in every loader
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    if task.trl is not None:
        # as in every other recipe, where TRL has another mind; autocast is slow on most CPUs
        usual |= {"bf16": False, "logging_steps": 500}
        if "gradient_checkpointing" not in trainer:
            usual["activation_checkpointing"] = False
    ours = {RATE: rate, "output_dir": str(output), "disable_tqdm": True}
    return task.arguments(**{**usual, **trainer, **ours})


def check_trainer(said: Any, has_eval: bool, task: Task, problems: list[str]) -> None:
    """Report everything that is wrong with the section; nothing is created or loaded."""
    trainer = {} if said is None else said
    if not isinstance(trainer, Mapping):
        return  # reported by the recipe
    before = len(problems)
    try:
        kind = task.arguments
    except ConfigError as error:
        problems.append(f"task: {error}")
        return
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind) if f.name not in _OURS]
    problems.extend(f"trainer.{name}: {_OURS[name]}" for name in trainer if name in _OURS)
    report_unknown(
        {name: None for name in trainer if name not in _OURS},
        known,
        "trainer",
        problems,
        elsewhere,
    )
    for name, value in trainer.items():
        values = value if name == RATE and isinstance(value, list) else [value]
        faults = [mismatch(each, hints[name]) for each in values] if name in known else []
        problems.extend(f"trainer.{name}: {fault}" for fault in faults if fault)
    rates = trainer.get(RATE)
    if isinstance(rates, list):
        if len(set(map(str, rates))) < max(len(rates), 1):
            problems.append(f"trainer.{RATE}: {rates!r} is empty or has a value twice")
        if len(rates) > 1 and not has_eval:
            problems.append(f"trainer.{RATE}: several to choose from need data.eval")
    if len(problems) == before:
        _check_values(trainer, has_eval, task, problems)


def _check_values(
    trainer: Mapping[str, Any], has_eval: bool, task: Task, problems: list[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when it is done in earnest
        for rate in _rates(trainer, task):
            if not rate > 0:
                problems.append(f"trainer.{RATE}: {rate!r} is not above 0")
        try:
            made = _arguments(task, trainer, 1.0, Path("unused"))
        except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:
            problems.append(f"trainer: {error}")
            return
    if not has_eval and made.eval_strategy != "no":
        problems.append("trainer.eval_strategy: there is nothing to evaluate on; set data.eval")
    if made.max_steps <= 0 and made.num_train_epochs <= 0:
        problems.append("trainer: neither max_steps nor num_train_epochs is above 0")
