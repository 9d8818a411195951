"""Saving Trainer's checkpoints so that a kill can be seen in them, and resuming from whole ones.

As in ``integrations.trainer.hooks``, each function that takes ``original`` stands in front of a
method of Trainer.
"""

import contextlib
import functools
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from hf_lora.adapter_io.checkpoints import (
    Verdict,
    check_whole,
    damage,
    newest_whole,
    numbered,
    random_states,
)
from hf_lora.errors import AdapterFileError, HfLoRAWarning
from hf_lora.files.manifest import begin_manifest, finish_manifest, has_manifest, is_unfinished
from hf_lora.files.safe_json import read_json
from hf_lora.integrations.trainer.checks import check_finite
from hf_lora.model.registry import Registry, find

Original = Callable[..., Any]
"""The method of Trainer, bound to the trainer."""

_STATE_FILE = "trainer_state.json"
_SAVES = "save_to_json"
_RESUMES = "_hf_lora_resumes"
_RANDOM_STATE = re.compile(r"rng_state(?:_(\d+))?\.pth")


def save_checkpoint(original: Original, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Save a checkpoint with a manifest: begun before its first file, finished after its last.

    Finished before an older checkpoint is deleted or this one is pushed, when every process is
    done.

    Raises:
        GradientError: The adapters are no longer numbers. No folder is made.
    """
    state = trainer.state
    if not is_ours(trainer) or _SAVES in vars(state):  # by the mixin and by the patch as well
        original(*args, **kwargs)
        return
    for registry in _registries(trainer):
        check_finite(registry)  # before there is a folder, which a resume would choose
    trial = inspect.signature(original).bind(*args, **kwargs).arguments.get("trial")
    folder = Path(trainer._get_output_dir(trial=trial), f"checkpoint-{state.global_step}")
    wait = trainer.accelerator.wait_for_everyone
    saves = trainer.args.should_save

    def save_to_json(path: str) -> None:
        type(state).save_to_json(state, path)
        wait()
        finish_manifest(folder)

    if saves:
        begin_manifest(folder)
    # Trainer writes this one last
    vars(state)[_SAVES] = save_to_json
    try:
        original(*args, **kwargs)
    finally:
        del vars(state)[_SAVES]
    if not saves:
        wait()


def run_epoch(original: Original, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Train an epoch, unless the run was finished when its checkpoint was saved.

    Trainer would train one step before it sees that there are enough.
    """
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    resumed = given.get("resume_from_checkpoint") is not None
    if resumed and is_ours(trainer) and _is_finished(trainer):
        trainer.control.should_training_stop = True
        return None
    return original(*args, **kwargs)


@contextlib.contextmanager
def resuming(
    original: Original, trainer: Any, args: tuple, kwargs: dict[str, Any]
) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Hand out the arguments of ``train`` with a whole checkpoint to go on from.

    Raises:
        AdapterFileError: As for :func:`checkpoint_to_resume`.
    """
    if _RESUMES in vars(trainer):  # by the mixin and by the patch as well
        yield args, kwargs
        return
    given = inspect.signature(original).bind(*args, **kwargs)
    chosen = checkpoint_to_resume(trainer, given.arguments.get("resume_from_checkpoint"))
    if "resume_from_checkpoint" in given.arguments:
        given.arguments["resume_from_checkpoint"] = chosen
    vars(trainer)[_RESUMES] = True
    try:
        yield given.args, given.kwargs
    finally:
        del vars(trainer)[_RESUMES]
    if chosen:
        _tell_if_nothing_was_left(trainer)


def checkpoint_to_resume(trainer: Any, wanted: Any) -> Any:
    """Return from which checkpoint to go on, in the form that ``Trainer.train`` takes.

    Args:
        trainer: A trainer of a model of ours.
        wanted: What was given to ``train`` as ``resume_from_checkpoint``.

    Returns:
        For True, the newest whole checkpoint in the output folder, or None if it holds only such
        whose first save was cut short; else ``wanted``.

    Raises:
        AdapterFileError: The checkpoint that was named, or each that is there, is not whole.
    """
    output = Path(trainer.args.output_dir)
    judge = functools.partial(_judge, trainer)
    reads = trainer.is_local_process_zero()
    if wanted is True:
        there = _checkpoints(output)
        # Trainer has its own words for that there is none
        newest = newest_whole(there, judge, reads=reads) if there else None
        return wanted if not there else newest and str(newest)
    if isinstance(wanted, (str, os.PathLike)) and os.path.isdir(wanted):
        named = Path(wanted)
        check_whole(named, _checkpoints(named.parent), judge, reads=reads)
    return wanted


def _tell_if_nothing_was_left(trainer: Any) -> None:
    """Warn that a run trained no step, because its checkpoint was that of a finished one."""
    step = trainer.state.global_step
    if trainer._initial_global_step == step:
        warnings.warn(
            f"The checkpoint that was resumed is of step {step}, with which this run ends "
            f"(max_steps is {trainer.state.max_steps}), so nothing was trained. Raise max_steps or "
            "num_train_epochs to train on.",
            HfLoRAWarning,
            stacklevel=4,
        )


def is_ours(trainer: Any) -> bool:
    """Say whether a trainer's model, or some part of it, is wrapped."""
    return bool(_registries(trainer))


def _registries(trainer: Any) -> list[Registry]:
    """Return those of the trainer's model and of its parts, of which a router has several."""
    modules = trainer.model.modules() if isinstance(trainer.model, nn.Module) else ()
    return [found[1] for module in modules if (found := find(module)) is not None]


def _checkpoints(directory: Path) -> list[Path]:
    return numbered(directory, r"checkpoint-(\d+)")


def _is_finished(trainer: Any) -> bool:
    if trainer.state.global_step >= trainer.state.max_steps:
        return True
    # a callback whose own state says that it has stopped the run, if that was restored
    return any(
        getattr(callback, "early_stopping_patience_counter", 0)
        >= getattr(callback, "early_stopping_patience", float("inf"))
        for callback in trainer.callback_handler.callbacks
    )


def _judge(trainer: Any, folder: Path) -> Verdict:
    faults = damage(folder)
    try:
        state = read_json(folder / _STATE_FILE) if (folder / _STATE_FILE).exists() else None
    except AdapterFileError as error:
        return Verdict((*faults, f"{error}"), unfinished=is_unfinished(folder))
    if state is None:
        cut = f"{_STATE_FILE}, which is written last, is missing: its save was cut short"
        unfinished = not has_manifest(folder) or is_unfinished(folder)
        return Verdict(tuple(faults) or (cut,), unfinished=unfinished)
    names = os.listdir(folder)
    numbers = {m[1] or "" for name in names if (m := _RANDOM_STATE.fullmatch(name))}
    kept = {**_kept(trainer, names), "random state": bool(numbers)}
    gone = [word for word, there in kept.items() if not there]
    random = random_states(numbers, trainer.args.world_size)
    lacks = list(random.lacks)
    # one that a manifest does not miss was never saved, and so it is where all are gone
    if has_manifest(folder) or len(gone) == len(kept):
        lacks += gone
    else:
        faults += [f"its {word} is missing" for word in gone]
    if getattr(trainer.accelerator, "scaler", None) is not None and "scaler.pt" not in names:
        lacks.append("gradient scaler")
    if not trainer.args.restore_callback_states_from_checkpoint:
        lacks += _forgotten(trainer, state)
    return Verdict((*faults, *random.faults), tuple(lacks), unfinished=is_unfinished(folder))


def _kept(trainer: Any, names: list[str]) -> dict[str, bool]:
    """Return which states a checkpoint should keep, and whether it does."""
    if trainer.is_deepspeed_enabled:  # in files of its own, the schedule among them
        return {"optimizer": any(name.startswith("global_step") for name in names)}
    return {
        "optimizer": any("optimizer" in name for name in names),
        "schedule": "scheduler.pt" in names,
    }


def _forgotten(trainer: Any, state: dict[str, Any]) -> list[str]:
    """Return a line for each callback whose state in a checkpoint will not be restored."""
    kept = state.get("stateful_callbacks")
    found = []
    for callback in trainer.callback_handler.callbacks:
        name = type(callback).__name__
        there = kept.get(name) if isinstance(kept, dict) else None
        if there is None or not hasattr(callback, "state"):
            continue
        now = json.loads(json.dumps(callback.state()))
        if now not in (there if isinstance(there, list) else [there]):
            words = "pass restore_callback_states_from_checkpoint=True to have it"
            found.append(f"the state of {name} ({words})")
    return found
