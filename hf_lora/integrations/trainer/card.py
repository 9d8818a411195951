"""The model card that a Trainer of ours writes: what it knows of the run, in our own card."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hf_lora.adapter_io.save import base_name
from hf_lora.files.atomic import refused_as_save_error
from hf_lora.hub.base_model import base_license, hub_base, hub_id
from hf_lora.hub.card.card import CARD_FILE, adapter_card
from hf_lora.hub.card.training import run_of
from hf_lora.integrations.trainer.push import name_for_others
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
    directory = Path(trainer.args.output_dir)
    # TRL writes cards of runs that go nowhere: only a run that is pushed asks the Hub for anything
    pushed = trainer.hub_model_id is not None
    named = given.get("finetuned_from") or base_name(model)
    base = hub_base(named) if pushed else hub_id(named)
    licence = base_license(base, trainer.args.hub_token) if base and pushed else {}
    processor = getattr(trainer, "processing_class", None) is not None
    card = adapter_card(
        model,
        registry,
        list(registry.adapters),
        base=base,
        repo_id=trainer.hub_model_id or directory.resolve().name,
        training=run_of(trainer).told({**licence, **given}, processor=processor),
    )
    with refused_as_save_error(f"{directory / CARD_FILE} could not be written"):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CARD_FILE).write_text(card, encoding="utf-8")
    if pushed:
        name_for_others(model, registry, directory, base)
