"""The model card that a Trainer of ours writes: what it knows of the run, in our own card."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_lora.hf.card import Training, adapter_card
from hf_lora.hf.hub import CARD_FILE
from hf_lora.hf.saving import base_name
from hf_lora.model.registry import find


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
    base = given.get("finetuned_from") or base_name(model)
    card = adapter_card(
        model,
        registry,
        list(registry.adapters),
        base=None if base is None or os.path.isdir(base) else base,
        repo_id=trainer.hub_model_id or given.get("model_name") or "my-adapter",
        training=_training(trainer, given),
    )
    directory = Path(trainer.args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def _training(trainer: Any, given: Mapping[str, Any]) -> Training:
    from transformers.modelcard import extract_hyperparameters_from_trainer, parse_log_history

    _, _, results = parse_log_history(trainer.state.log_history)
    metrics = {
        name: value
        for name, value in (results or {}).items()
        if isinstance(value, (int, float)) and name not in ("epoch", "step")
    }
    # TRL's trainers carry tags of their own, such as "dpo"
    tags = [*_as_list(given.get("tags")), *_as_list(getattr(trainer, "_tag_names", None))]
    extra = {"language": given.get("language"), "license": given.get("license"), "tags": tags}
    words = [*_as_list(given.get("dataset")), *_as_list(given.get("dataset_name"))]
    size = _length(trainer.train_dataset)
    return Training(
        datasets=_as_list(given.get("dataset_tags")),
        dataset_words=", ".join(words) or (f"{size:,} examples." if size else ""),
        metrics=metrics,
        hyperparameters=extract_hyperparameters_from_trainer(trainer),
        extra={name: value for name, value in extra.items() if value},
    )


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        return 0
