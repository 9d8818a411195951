"""The model card that a Trainer of ours writes: what it knows of the run, in our own card."""

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from hf_lora.hf.base_on_hub import LICENSE_FIELDS, base_license, hub_base
from hf_lora.hf.card import CARD_FILE, Training, adapter_card
from hf_lora.hf.saving import base_name
from hf_lora.model.registry import find

# What stands in a log of an evaluation beside results.
_NO_RESULTS = (
    "epoch", "step", "runtime", "samples_per_second", "steps_per_second", "num_tokens",
    "model_preparation_time", "num_input_tokens_seen",
)  # fmt: skip
# Kinds of files that `datasets` reads; it names them where a data set has no name of its own.
_FILES = ("arrow", "csv", "generator", "json", "pandas", "parquet", "text")


def create_model_card(
    original: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any
) -> None:
    """Write our card in the place of the one of ``Trainer``, or of TRL's trainers.

    Takes the arguments of the method that it stands in front of; theirs differ.
    """
    found = find(trainer.model) if isinstance(trainer.model, nn.Module) else None
    if found is None:
        original(*args, **kwargs)
        return
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    if not trainer.is_world_process_zero():
        return
    model, registry = found
    # TRL writes cards of runs that go nowhere: only a run that is pushed asks the Hub for anything
    pushed = trainer.hub_model_id is not None
    base = hub_base(given.get("finetuned_from") or base_name(model))
    license_ = base_license(base, trainer.args.hub_token) if base and pushed else {}
    training = training_of(trainer, {**license_, **given})
    card = adapter_card(
        model,
        registry,
        list(registry.adapters),
        base=base,
        repo_id=trainer.hub_model_id or Path(trainer.args.output_dir).resolve().name,
        training=training,
    )
    directory = Path(trainer.args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def training_of(trainer: Any, given: Mapping[str, Any]) -> Training:
    """Return what a trainer knows of its run.

    Args:
        trainer: The trainer, trained or not.
        given: What the user says: the arguments of ``create_model_card``, Trainer's and TRL's.
    """
    names = [*_listed(given.get("dataset")), *_listed(given.get("dataset_name"))]
    ids = _listed(given.get("dataset_tags")) or [name for name in names if _is_id(name)]
    ids = ids or ([] if names else _known_dataset(trainer))
    words = [name for name in names if name not in ids] + _listed(given.get("dataset_args"))
    # TRL's trainers carry tags of their own, such as "dpo"
    tags = [*_listed(given.get("tags")), *_listed(getattr(trainer, "_tag_names", None))]
    tasks = _listed(given.get("tasks"))
    named = {name: given.get(name) for name in ("language", *LICENSE_FIELDS)}
    return Training(
        title=given.get("model_name") or "",
        datasets=ids,
        dataset_words=", ".join([*words, *_sizes(trainer)]),
        metrics=_results(trainer),
        hyperparameters=_settings(trainer),
        extra={**named, "tags": tags, **({"pipeline_tag": tasks[0]} if tasks else {})},
        processor=getattr(trainer, "processing_class", None) is not None,
    )


def _known_dataset(trainer: Any) -> list[str]:
    """Return the id of a data set from the Hub, which ``datasets`` keeps with it."""
    name = getattr(getattr(trainer, "train_dataset", None), "builder_name", None)
    return [name] if isinstance(name, str) and name not in _FILES and _is_id(name, "") else []


def _is_id(name: str, needed: str = "/") -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return needed in name


def _sizes(trainer: Any) -> list[str]:
    words = []
    for name, use in (("train_dataset", "examples to train"), ("eval_dataset", "to evaluate")):
        size = _length(getattr(trainer, name, None))
        words += [f"{size:,} {use}"] if size else []
    return words


def _results(trainer: Any) -> dict[str, int | float]:
    """Return the results of the evaluation that tells of the weights as they are now."""
    history = trainer.state.log_history
    evaluations = [log for log in history if any(name.startswith("eval_") for name in log)]
    ends = [number for number, log in enumerate(history) if "train_runtime" in log]
    after = [log for log in evaluations if ends and history.index(log) > ends[-1]]
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    if not after and best is not None:
        evaluations = [log for log in evaluations if log.get("step") == best]
    step = (after or evaluations or [{}])[-1].get("step")
    return {
        name.removeprefix("eval_").replace("_", " ").capitalize(): value
        for log in after or evaluations
        if log.get("step") == step
        for name, value in log.items()
        if isinstance(value, (int, float)) and not name.endswith(_NO_RESULTS)
    }


def _settings(trainer: Any) -> dict[str, Any]:
    """Return the settings that decide a run, each in a few words."""
    args, state = trainer.args, trainer.state
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    parts = [f"{args.per_device_train_batch_size} per device"]
    parts += [f"{args.world_size} devices"] if args.world_size > 1 else []
    steps = args.gradient_accumulation_steps
    parts += [f"{steps} steps of accumulation"] if steps > 1 else []
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    decay = f", weight decay {args.weight_decay:g}" if args.weight_decay else ""
    warmup = f", warm-up {args.warmup_steps:g}" if args.warmup_steps else ""
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    losses = [log["train_loss"] for log in state.log_history if "train_loss" in log]
    done = {"Steps": f"{state.global_step:,}", "Epochs": state.epoch} if state.global_step else {}
    return {
        **done,
        "Batch": f"{batch} ({', '.join(parts)})",
        "Learning rate": f"{args.learning_rate:g}, {schedule}{warmup}",
        "Optimizer": f"{getattr(args.optim, 'value', args.optim)}{decay}",
        **({"Mixed precision": precision} if precision else {}),
        "Seed": args.seed,
        **({"Mean training loss": losses[-1]} if losses else {}),
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch")),
    }


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        return 0
