"""What people call the fields of a recipe: short names that work, others that are told ours."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import TrainingArguments

from hf_lora import peft_names
from hf_lora.config import LoRAConfig
from hf_lora.recipes.data import Data

SHORT: Mapping[str, str] = MappingProxyType(
    {
        "lr": "learning_rate",
        "epochs": "num_train_epochs",
        "num_epochs": "num_train_epochs",
        "steps": "max_steps",
        "batch_size": "per_device_train_batch_size",
        "micro_batch_size": "per_device_train_batch_size",
        "train_batch_size": "per_device_train_batch_size",
        "eval_batch_size": "per_device_eval_batch_size",
        "accumulation": "gradient_accumulation_steps",
        "accumulation_steps": "gradient_accumulation_steps",
        "grad_accum": "gradient_accumulation_steps",
        "gradient_accumulation": "gradient_accumulation_steps",
        "scheduler": "lr_scheduler_type",
        "lr_scheduler": "lr_scheduler_type",
        "optimizer": "optim",
        "warmup": "warmup_steps",
        "warmup_ratio": "warmup_steps",
    }
)
"""Short names that work in a recipe's ``trainer`` section, to those of ``TrainingArguments``."""

_ELSEWHERE = MappingProxyType(
    {
        **dict.fromkeys(("model", "base_model", "model_name", "model_name_or_path"), "base"),
        **dict.fromkeys(("dataset", "datasets", "train", "train_file", "data_path"), "data.train"),
        **dict.fromkeys(("val_set_size", "validation", "eval_file", "test"), "data.eval"),
        **dict.fromkeys(
            ("max_seq_length", "sequence_len", "cutoff_len", "model_max_length"), "data.max_length"
        ),
        **dict.fromkeys(("train_on_inputs", "assistant_only_loss"), "data.loss: completions"),
        **dict.fromkeys(("output_dir", "output_folder"), "output"),
        **dict.fromkeys(("hub_model_id", "push_to_hub"), "push.repo_id"),
        **{name: f"trainer.{name}" for name in SHORT},
        **{field.name: f"trainer.{field.name}" for field in dataclasses.fields(TrainingArguments)},
        **{field.name: f"data.{field.name}" for field in dataclasses.fields(Data)},
        **{field.name: f"lora.{field.name}" for field in dataclasses.fields(LoRAConfig)},
        **{name: f"lora.{word}" for name, word in peft_names.FIELDS.items() if word.isidentifier()},
        "train": "data.train, or lora.train for modules trained in full",
        "seed": "trainer.seed",
        "output_dir": "output",
    }
)


def elsewhere(name: str) -> str:
    """Return what to say of a field that stands where it does not belong, as the end of a line."""
    place = _ELSEWHERE.get(name)
    return f" (here: {place})" if place else peft_names.hint(name)


def in_full(trainer: Any, problems: list[str]) -> Any:
    """Return a ``trainer`` section with the whole names of what is said by short ones."""
    if not isinstance(trainer, Mapping):
        return trainer
    found: dict[str, Any] = {}
    for name, value in trainer.items():
        whole = SHORT.get(name, name)
        if whole in found:
            problems.append(f"trainer.{name}: the same as {whole}, which stands there, too")
        found[whole] = value
    return found
