"""What hf_lora does inside transformers' Trainer: checks before a run, resume, best model, pushes.

Each function stands in front of the method of Trainer that it is named after, acts on our models
only, and otherwise calls the original at once. They reach Trainer in two ways: as a patch of the
class, which :func:`hf_lora.wrap` installs, or as :class:`hf_lora.LoRATrainerMixin`.
"""

import os
from pathlib import Path
from typing import Any

from torch import nn

from hf_lora.adapter_io.owner import check_rest_frozen, check_saves_as_one, holder_of, owner
from hf_lora.adapter_io.restore import restore_checkpoint
from hf_lora.adapter_io.save import base_name
from hf_lora.compat.libraries import is_pretrained
from hf_lora.files.manifest import finish_manifest, has_manifest
from hf_lora.hub.base_model import hub_base
from hf_lora.hub.card.training import run_of
from hf_lora.integrations.in_front import Original
from hf_lora.integrations.sentence_models import is_sentence_model, restore_modules
from hf_lora.integrations.trainer.checks import check_ready, nothing_trains, switch_dropout_off
from hf_lora.integrations.trainer.ddp import reaches_all
from hf_lora.integrations.trainer.deepspeed import check_loaded, engines_without_base
from hf_lora.integrations.trainer.optimizer import description_kept
from hf_lora.integrations.trainer.push import bring_adapters, name_for_others
from hf_lora.integrations.trainer.resume import resuming
from hf_lora.model.registry import Registry, wrapped
from hf_lora.model.watch import heads_heard

_WITH_CHECKPOINTS = ("checkpoint", "all_checkpoints")
_NO_GRAPH = "does not require grad"
"""What torch's error says when a loss depends on nothing that trains."""


def train(original: Original, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Check what would make the run pointless, then train, with more checks at the first step.

    Raises:
        GradientError: Nothing of the model trains, no gradient reaches any adapter, or the
            optimizer holds none.
        AdapterFileError: The checkpoint to resume from, or each that is there, is not whole.
        StateError: The model is merged, or the run would write into the base.
    """
    found = _ours(trainer.model)
    if is_pretrained(trainer.model) and _will_save(trainer.args):
        check_saves_as_one(trainer.model)
        if found is not None:
            check_rest_frozen(*found)
    if found is None:
        return original(*args, **kwargs)
    check_ready(*found, trainer.args)
    part, registry = wrapped(holder_of(found[0]))
    registry.buffers.begin(
        part, registry
    )  # also where the model is compiled, and runs no hook of ours
    if getattr(trainer.args, "disable_dropout", False):
        switch_dropout_off(found[1])
    _add_gradient_check(trainer)
    try:
        with (
            resuming(original, trainer, args, kwargs) as (args, kwargs),
            description_kept(trainer),
            engines_without_base(trainer.accelerator),
        ):
            result = original(*args, **kwargs)
    except RuntimeError as error:
        if _NO_GRAPH not in str(error):
            raise
        raise nothing_trains(*(_ours(trainer.model) or found)) from error
    _, registry = _ours(trainer.model) or found
    run = run_of(trainer)
    for name in registry.routing.active:
        if any(parameter.requires_grad for _, parameter in registry.parameters(name)):
            registry.adapter(name).training = run
    return result


def training_step(original: Original, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute a step, with what carries adapters in its place and heard in the loss.

    Raises:
        StateError: Adapted layers were replaced since.
    """
    found = _ours(trainer.model)
    if found is None:
        return original(*args, **kwargs)
    found[1].gradients_checked = not _own_format(trainer)
    try:
        with heads_heard(*found, "step", trains=True):
            return original(*args, **kwargs)
    finally:
        found[1].gradients_checked = False


def evaluation_loop(original: Original, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Evaluate, with what carries adapters in its place and heard in what is computed."""
    found = _ours(trainer.model)
    if found is None:
        return original(*args, **kwargs)
    with heads_heard(*found, "evaluation", trains=False):
        return original(*args, **kwargs)


def build_accelerator_args(original: Original, trainer: Any, **kwargs: Any) -> dict[str, Any]:
    """Spare DDP its search for unused parameters where there are none, if the user does not say."""
    built = original(**kwargs)
    found = _ours(trainer.model)
    if (
        found is not None
        and trainer.args.ddp_find_unused_parameters is None
        and reaches_all(*found)
    ):
        for handler in built["kwargs_handlers"]:
            if hasattr(handler, "find_unused_parameters"):
                handler.find_unused_parameters = False
    return built


def load_from_checkpoint(
    original: Original, trainer: Any, resume_from_checkpoint: str, model: Any = None
) -> None:
    """Resume: give the model the adapters of a checkpoint."""
    target = trainer.model if model is None else model
    if is_sentence_model(target):
        restore_modules(target, resume_from_checkpoint)
    elif _saves_adapters(trainer, target):
        restore_checkpoint(target, resume_from_checkpoint)
    else:
        original(resume_from_checkpoint, *(() if model is None else (model,)))


def load_best_model(original: Original, trainer: Any) -> None:
    """End a run with the adapters of its best checkpoint.

    Where that is gone, or on the disk of another node, Trainer itself says so and goes on.
    """
    checkpoint = trainer.state.best_model_checkpoint
    if is_sentence_model(trainer.model) and checkpoint and os.path.isdir(checkpoint):
        trainer._load_from_checkpoint(checkpoint)  # the original only logs what it raises
        original()
    elif _saves_adapters(trainer, trainer.model) and os.path.isdir(checkpoint):
        restore_checkpoint(trainer.model, checkpoint)
    else:
        original()
        if _own_format(trainer) and _is_ours(trainer.model) and os.path.isdir(checkpoint):
            check_loaded(trainer.model, checkpoint)


def push_from_checkpoint(original: Original, trainer: Any, checkpoint_folder: str) -> None:
    """Put a checkpoint's adapters where Trainer pushes from: without PEFT it would leave them."""
    found = _ours(trainer.model)
    if found is not None and _will_push(trainer):
        model, registry = found
        checkpoint, output = Path(checkpoint_folder), Path(trainer.args.output_dir)
        bring_adapters(registry, checkpoint, output)
        strategy = trainer.args.hub_strategy
        pushed = [output, checkpoint] if strategy in _WITH_CHECKPOINTS else [output]
        for folder in pushed:
            name_for_others(model, registry, folder, hub_base(base_name(model)))
        if checkpoint in pushed and has_manifest(checkpoint):
            finish_manifest(checkpoint)  # its adapters may have got another base's name
    original(checkpoint_folder)


def _ours(model: Any) -> tuple[nn.Module, Registry] | None:
    return owner(model) if isinstance(model, nn.Module) else None


def _saves_adapters(trainer: Any, model: Any) -> bool:
    """Say whether the adapters' files are all the weights that a checkpoint holds.

    They are not where DeepSpeed keeps files of its own, nor for a wrapped ``nn.Module`` that is
    no transformers model: Trainer saves that one's state dict.
    """
    return _is_ours(model) and not _own_format(trainer)


def _is_ours(model: Any) -> bool:
    found = _ours(model)
    return found is not None and is_pretrained(found[0])


def _will_save(args: Any) -> bool:
    return args.save_strategy != "no" or args.push_to_hub


def _own_format(trainer: Any) -> bool:
    return bool(trainer.is_deepspeed_enabled)


def _will_push(trainer: Any) -> bool:
    """Say whether Trainer goes on: what a running upload reads must not change under it."""
    if not trainer.is_world_process_zero() or trainer.args.hub_strategy == "end":
        return False
    running = getattr(trainer, "push_in_progress", None)
    return trainer.args.hub_always_push or running is None or running.is_done()


def _add_gradient_check(trainer: Any) -> None:
    from hf_lora.integrations.trainer.callback import GradientCheck

    # DeepSpeed keeps gradients elsewhere than on the parameters
    present = any(isinstance(c, GradientCheck) for c in trainer.callback_handler.callbacks)
    if not present and not _own_format(trainer):
        trainer.add_callback(GradientCheck())
