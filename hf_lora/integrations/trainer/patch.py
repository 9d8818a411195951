"""Putting hf_lora's functions in front of the methods of Trainer, once, on the class.

Subclasses (Seq2SeqTrainer, TRL's trainers) inherit them.
"""

import sys
from collections.abc import Callable
from typing import Any

from hf_lora.integrations.import_hooks import cancel, when_imported
from hf_lora.integrations.in_front import patch_class, take_off
from hf_lora.integrations.trainer import fsdp as trainer_fsdp
from hf_lora.integrations.trainer import hooks as trainer
from hf_lora.integrations.trainer import resume as trainer_resume
from hf_lora.integrations.trainer.card import create_model_card

TRAINER: dict[str, Callable[..., Any]] = {
    "train": trainer.train,
    "create_model_card": create_model_card,
    "_load_from_checkpoint": trainer.load_from_checkpoint,
    "_load_best_model": trainer.load_best_model,
    "_push_from_checkpoint": trainer.push_from_checkpoint,
    "_save_checkpoint": trainer_resume.save_checkpoint,
    "_run_epoch": trainer_resume.run_epoch,
    "_build_accelerator_args": trainer.build_accelerator_args,
    "save_model": trainer_fsdp.save_model,
    "_save_optimizer_and_scheduler": trainer_fsdp.save_optimizer_and_scheduler,
    "_load_optimizer_and_scheduler": trainer_fsdp.load_optimizer_and_scheduler,
    "training_step": trainer.training_step,
    "evaluation_loop": trainer.evaluation_loop,
}
"""The methods of Trainer in front of which ours stand. Seen in transformers 5.24."""

_METHODS: dict[str, tuple[str, dict[str, Callable[..., Any]]]] = {
    "transformers.trainer": ("Trainer", TRAINER),
    # the base of TRL's trainers overrides this one method
    "trl.trainer.base_trainer": ("_BaseTrainer", {"create_model_card": create_model_card}),
    # its trainers override these: they load a second model from the checkpoint, and log what fails
    "sentence_transformers.base.trainer": (
        "BaseTrainer",
        {
            "_load_from_checkpoint": trainer.load_from_checkpoint,
            "_load_best_model": trainer.load_best_model,
        },
    ),
}
_OPTIONAL = {"trl.trainer.base_trainer"}

_enabled = True


def install() -> None:
    """Patch Trainer now if it is imported, and otherwise when it will be."""
    if _enabled:
        for name in _METHODS:
            when_imported(name, _patch)


def disable() -> None:
    """Leave transformers' Trainer alone in this process, now and whatever is wrapped later.

    For those who use :class:`hf_lora.LoRATrainerMixin` instead.
    """
    global _enabled
    _enabled = False
    for name, (class_name, methods) in _METHODS.items():
        cancel(name, _patch)
        owner = getattr(sys.modules.get(name), class_name, None)
        if owner is not None:
            for method in methods:
                take_off(owner, method)


def enable() -> None:
    """Undo :func:`disable`."""
    global _enabled
    _enabled = True
    install()


def _patch(module: Any) -> None:
    class_name, methods = _METHODS[module.__name__]
    words = None if module.__name__ in _OPTIONAL else "resuming or loading the best model may fail"
    patch_class(module, class_name, methods, words)
