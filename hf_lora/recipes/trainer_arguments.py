"""The recipe's ``trainer`` section: names, types and values that TrainingArguments accepts."""

import dataclasses
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_lora.recipes.fields import mismatch, report_unknown
from hf_lora.recipes.names import elsewhere

RATE = "learning_rate"
DEFAULT_RATE = 2e-4
"""What few adapters are far from; Trainer's own 5e-5 is meant for training every weight."""

_OURS = {
    "output_dir": "set output instead",
    "push_to_hub": "set push instead",
    "resume_from_checkpoint": "run with --resume instead",
    "disable_tqdm": "hf-lora shows its own progress",
}
_OURS |= dict.fromkeys(
    ("hub_model_id", "hub_token", "hub_private_repo", "hub_strategy", "hub_always_push"),
    "set push instead",
)
_OURS["hub_revision"] = "set push instead"


def learning_rates(trainer: Mapping[str, Any]) -> list[float]:
    """Return the learning rates to try, one if the recipe has no list."""
    said = trainer.get(RATE, DEFAULT_RATE)
    return [float(rate) for rate in (said if isinstance(said, list) else [said])]


def arguments(trainer: Mapping[str, Any], rate: float, output: Path) -> TrainingArguments:
    """Return transformers' arguments for training at one learning rate."""
    ours = {RATE: rate, "output_dir": str(output), "disable_tqdm": True}
    # pinned memory is for copying to an accelerator; without one torch warns in every loader
    return TrainingArguments(
        **{"dataloader_pin_memory": torch.accelerator.is_available(), **trainer, **ours}
    )


def check_trainer(said: Any, has_eval: bool, problems: list[str]) -> None:
    """Report everything that is wrong with the section; nothing is created or loaded."""
    trainer = {} if said is None else said
    if not isinstance(trainer, Mapping):
        return  # reported by the recipe
    before = len(problems)
    hints = typing.get_type_hints(TrainingArguments)
    known = [f.name for f in dataclasses.fields(TrainingArguments) if f.name not in _OURS]
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
        _check_values(trainer, has_eval, problems)


def _check_values(trainer: Mapping[str, Any], has_eval: bool, problems: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when it is done in earnest
        for rate in learning_rates(trainer):
            if not rate > 0:
                problems.append(f"trainer.{RATE}: {rate!r} is not above 0")
        try:
            made = arguments(trainer, 1.0, Path("unused"))
        except (ValueError, TypeError, KeyError, ImportError, RuntimeError, OSError) as error:
            problems.append(f"trainer: {error}")
            return
    if not has_eval and made.eval_strategy != "no":
        problems.append("trainer.eval_strategy: there is nothing to evaluate on; set data.eval")
    if made.max_steps <= 0 and made.num_train_epochs <= 0:
        problems.append("trainer: neither max_steps nor num_train_epochs is above 0")
