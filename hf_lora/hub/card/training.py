"""What a Trainer knows of a run: kept with the adapters that it trained, and told in their card."""

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_lora.hub.base_model import LICENSE_FIELDS
from hf_lora.hub.card.card import Training

# What stands in a log of an evaluation beside results.
_NO_RESULTS = (
    "epoch", "step", "runtime", "samples_per_second", "steps_per_second", "num_tokens",
    "model_preparation_time", "num_input_tokens_seen",
)  # fmt: skip
# Kinds of files that `datasets` reads; it names them where a data set has no name of its own.
_FILES = ("arrow", "csv", "generator", "json", "pandas", "parquet", "text")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a Trainer."""

    history: list[dict[str, Any]]
    """The trainer's own log: evaluations after the training are in it as well."""

    best: int | None
    """The step whose weights the run ended with, if those are not the last."""

    settings: Mapping[str, Any]
    versions: str
    datasets: tuple[str, ...]
    """Hub ids of the data, as far as the data says so."""

    sizes: tuple[str, ...]
    tags: tuple[str, ...]

    def told(self, given: Mapping[str, Any], *, processor: bool = False) -> Training:
        """Return what a card tells.

        Args:
            given: What the user adds: arguments of ``create_model_card``, Trainer's and TRL's.
            processor: Whether the tokenizer is pushed as well.
        """
        names = [*_listed(given.get("dataset")), *_listed(given.get("dataset_name"))]
        ids = _listed(given.get("dataset_tags")) or [name for name in names if _is_id(name)]
        ids = ids or ([] if names else list(self.datasets))
        words = [name for name in names if name not in ids] + _listed(given.get("dataset_args"))
        # that of a resumed run which was finished already is none
        ends = [log for log in self.history if log.get("train_steps_per_second", 1)]
        losses = [log["train_loss"] for log in ends if "train_loss" in log]
        tasks = _listed(given.get("tasks"))
        extra = {name: given.get(name) for name in ("language", *LICENSE_FIELDS)}
        extra["tags"] = [*_listed(given.get("tags")), *self.tags]
        return Training(
            title=given.get("model_name") or "",
            datasets=ids,
            dataset_words=", ".join([*words, *self.sizes]),
            metrics=self._results(),
            hyperparameters={
                **self.settings,
                **({"Mean training loss": losses[-1]} if losses else {}),
                "Versions": self.versions,
            },
            extra={**extra, **({"pipeline_tag": tasks[0]} if tasks else {})},
            processor=processor,
        )

    def _results(self) -> dict[str, int | float]:
        """Return the results of the evaluation that tells of the weights as they are now."""
        numbered = list(enumerate(self.history))
        found = [(n, log) for n, log in numbered if any(name.startswith("eval_") for name in log)]
        end = max((n for n, log in numbered if "train_runtime" in log), default=len(numbered))
        after = [log for n, log in found if n > end]
        logs = after or [log for _, log in found if self.best in (None, log.get("step"))]
        return {
            name.removeprefix("eval_").replace("_", " ").capitalize(): value
            for log in logs
            if log.get("step") == logs[-1].get("step")
            for name, value in log.items()
            if isinstance(value, (int, float)) and not name.endswith(_NO_RESULTS)
        }


def run_of(trainer: Any) -> Run:
    """Return what a trainer knows, trained or not."""
    args, state = trainer.args, trainer.state
    return Run(
        history=state.log_history,
        best=state.best_global_step if args.load_best_model_at_end else None,
        settings=_settings(args, state),
        versions=", ".join(f"{name} {version(name)}" for name in ("transformers", "torch")),
        datasets=_known_dataset(trainer),
        sizes=_sizes(trainer),
        # TRL's trainers carry tags of their own, such as "dpo"
        tags=tuple(_listed(getattr(trainer, "_tag_names", None))),
    )


def _settings(args: Any, state: Any) -> dict[str, Any]:
    """Return the settings that decide a run, each in a few words."""
    steps = args.gradient_accumulation_steps
    batch = args.train_batch_size * args.world_size * steps
    parts = [f"{args.per_device_train_batch_size} per device"]
    parts += [f"{args.world_size} processes"] if args.world_size > 1 else []
    parts += [f"{steps} steps of accumulation"] if steps > 1 else []
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    warmup = f", warm-up {args.warmup_steps:g}" if args.warmup_steps else ""
    decay = f", weight decay {args.weight_decay:g}" if args.weight_decay else ""
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    done = {"Steps": f"{state.global_step:,}", "Epochs": state.epoch} if state.global_step else {}
    return {
        **done,
        "Batch": f"{batch} ({', '.join(parts)})",
        "Learning rate": f"{args.learning_rate:g}, {schedule}{warmup}",
        "Optimizer": f"{getattr(args.optim, 'value', args.optim)}{decay}",
        **({"Mixed precision": precision} if precision else {}),
        "Seed": args.seed,
    }


def _known_dataset(trainer: Any) -> tuple[str, ...]:
    """Return the id of a data set from the Hub, which ``datasets`` keeps with it."""
    name = getattr(getattr(trainer, "train_dataset", None), "builder_name", None)
    if isinstance(name, str) and name not in _FILES and _is_id(name, ""):
        return (name,)
    return ()


def _sizes(trainer: Any) -> tuple[str, ...]:
    words = []
    for name, use in (("train_dataset", "examples to train"), ("eval_dataset", "to evaluate")):
        size = _length(getattr(trainer, name, None))
        words += [f"{size:,} {use}"] if size else []
    return tuple(words)


def _is_id(name: str, needed: str = "/") -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return needed in name


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]


def _length(dataset: Any) -> int:
    """Return the number of examples, of several data sets together; 0 if it is not known."""
    if isinstance(dataset, Mapping):
        return sum(map(_length, dataset.values()))
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return 0
