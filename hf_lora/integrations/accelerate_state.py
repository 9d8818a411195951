"""Checkpoints of a training loop with accelerate and no Trainer: adapters instead of models."""

import contextlib
import functools
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from hf_lora.adapter_io.checkpoints import (
    Verdict,
    check_whole,
    damage,
    newest_whole,
    numbered,
    random_states,
)
from hf_lora.adapter_io.collective import write_on_main
from hf_lora.adapter_io.restore import restore_checkpoint
from hf_lora.adapter_io.save import save_state
from hf_lora.compat.accelerate import as_without_fsdp, prepared_models, prepared_optimizers
from hf_lora.compat.dtensor import has_distributed_parameters
from hf_lora.errors import AdapterFileError, ConfigError, StateError
from hf_lora.files.manifest import begin_manifest, finish_manifest, has_manifest, is_unfinished
from hf_lora.integrations.trainer.deepspeed import check_loaded, is_our_engine, leave_base_out
from hf_lora.integrations.trainer.optimizer_state import whole_states
from hf_lora.model.registry import find

_MARK = "_hf_lora_registered"
_NUMBERED = r"checkpoint_(\d+)"
_RANDOM_STATE = re.compile(r"random_states_(\d+)\.pkl")


def register(accelerator: Any) -> None:
    """Make an ``accelerate.Accelerator`` save and load adapters instead of wrapped models.

    From then on, for models that hf_lora has wrapped,

    - ``accelerator.save_state(folder)`` writes the adapter, in PEFT's format, into the folder
      itself (that of a second model into ``models/1`` inside), beside what accelerate keeps there;
    - ``accelerator.load_state(folder)`` puts it back, exactly. The folder may come from another
      number of processes, with FSDP2 or without. A state that is not whole, because its save was
      cut short or a file was lost or damaged, is refused; of those that accelerate numbers itself
      the newest whole one is taken;
    - ``accelerator.save_model(model, folder)`` writes the adapter, as :func:`hf_lora.save` does.

    Every process calls these, as accelerate asks; the main one writes. Models that are not wrapped
    are saved as ever. It does not matter whether a model is prepared before or after.

    Args:
        accelerator: The accelerator; to register it twice changes nothing.

    Raises:
        ConfigError: It is no accelerator.

    Example:
        >>> accelerator = accelerate.Accelerator()
        >>> hf_lora.register(accelerator)
    """
    if not hasattr(accelerator, "register_save_state_pre_hook"):
        raise ConfigError(
            f"register takes the accelerate.Accelerator of a training loop, not {accelerator!r}; "
            "Trainer needs no registration."
        )
    if hasattr(accelerator, _MARK):
        return
    accelerator.register_save_state_pre_hook(functools.partial(_save_models, accelerator))
    accelerator.register_load_state_pre_hook(functools.partial(_load_models, accelerator))
    for name, function in (
        ("save_state", _save_state),
        ("load_state", _load_state),
        ("save_model", _save_model),
    ):
        method = getattr(accelerator, name)
        setattr(accelerator, name, functools.partial(function, accelerator, method))
    setattr(accelerator, _MARK, True)


def _save_models(accelerator: Any, models: list[nn.Module], weights: list, folder: str) -> None:
    """Save the adapters of wrapped models, and take these out of what accelerate saves."""
    if _has_ours(accelerator) and _here(accelerator):
        begin_manifest(Path(folder))
    for index in reversed(range(len(models))):
        if find(models[index]) is not None:
            _save(accelerator, models[index], _place(folder, index))
            # DeepSpeed writes models by itself, and hands out none of their weights
            del weights[index : index + 1]


def _load_models(accelerator: Any, models: list[nn.Module], folder: str) -> None:
    """Load the adapters of wrapped models, and take these out of what accelerate loads."""
    for index, engine in enumerate(prepared_models(accelerator)):
        if is_our_engine(engine):  # DeepSpeed has loaded it by itself
            check_loaded(engine, _place(folder, index))
    for index in reversed(range(len(models))):
        if find(models[index]) is not None:
            restore_checkpoint(models[index], _place(folder, index))
            del models[index]


def _save_model(
    accelerator: Any,
    original: Callable[..., Any],
    model: nn.Module,
    save_directory: str | Path,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
) -> None:
    """Save a wrapped model's adapters; takes the arguments of ``Accelerator.save_model``."""
    if find(model) is None:
        original(model, save_directory, max_shard_size, safe_serialization)
    elif not safe_serialization:
        raise StateError("An adapter is saved as safetensors; safe_serialization=False is not.")
    else:
        _save(accelerator, model, Path(save_directory))


def _save(accelerator: Any, model: nn.Module, folder: Path) -> None:
    here = _here(accelerator)
    if has_distributed_parameters(model):
        save_state(model, folder, writes=here)
    elif dist.is_initialized():
        write_on_main(lambda: _write(model, folder), here=here)
    else:
        _write(model, folder)


def _here(accelerator: Any) -> bool:
    each_node = accelerator.project_configuration.save_on_each_node
    return accelerator.is_local_main_process if each_node else accelerator.is_main_process


def _has_ours(accelerator: Any) -> bool:
    return any(find(model) is not None for model in prepared_models(accelerator))


def _write(model: nn.Module, folder: Path) -> None:
    save_state(model, folder)


def _place(folder: str, index: int) -> Path:
    # below a folder that is no adapter's, so that it is not taken for one of the first model's
    return Path(folder, "models", str(index)) if index else Path(folder)


def _save_state(accelerator: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Save a state with a manifest, by which a state that is not whole can be told."""
    ours = _has_ours(accelerator)
    given = inspect.signature(original).bind(*args, **kwargs).arguments.get("output_dir")
    # accelerate refuses folders of its own naming that exist; those are begun once it has made them
    automatic = accelerator.project_configuration.automatic_checkpoint_naming
    if ours and given is not None and not automatic and _here(accelerator):
        begin_manifest(Path(given))
    saved = _state(accelerator, original, *args, **kwargs)
    accelerator.wait_for_everyone()
    if ours and _here(accelerator):
        finish_manifest(Path(saved))
    return saved


def _load_state(accelerator: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Load a state that is whole: the one that is named, or the newest of accelerate's naming.

    Raises:
        AdapterFileError: It is not, or none of them is.
    """
    given = inspect.signature(original).bind(*args, **kwargs)
    wanted = given.arguments.get("input_dir")
    automatic = accelerator.project_configuration.automatic_checkpoint_naming
    judge, reads = functools.partial(_judge, accelerator), accelerator.is_local_main_process
    if _has_ours(accelerator) and wanted is not None and os.path.isdir(os.path.expanduser(wanted)):
        named = Path(os.path.expanduser(wanted))
        check_whole(named, numbered(named.parent, _NUMBERED), judge, reads=reads)
    elif _has_ours(accelerator) and wanted is None and automatic:
        directory = Path(accelerator.project_dir, "checkpoints")
        there = numbered(directory, _NUMBERED)
        newest = newest_whole(there, judge, reads=reads) if there else None
        if newest is None:
            raise AdapterFileError(f"{directory} holds no state that was saved to its end.")
        given.arguments["input_dir"] = str(newest)
    return _state(accelerator, original, *given.args, **given.kwargs)


def _judge(accelerator: Any, folder: Path) -> Verdict:
    found = (_RANDOM_STATE.fullmatch(name) for name in os.listdir(folder))
    numbers = {match[1] for match in found if match}
    faults = damage(folder)
    if not numbers and not has_manifest(folder):
        # accelerate would say nothing of it
        faults.append("random_states_0.pkl, which is written last, is missing")
    # a run of one process gives its file a number as well
    random = random_states({""} if numbers == {"0"} else numbers, accelerator.num_processes)
    unfinished = is_unfinished(folder) or not (numbers or has_manifest(folder))
    return Verdict((*faults, *random.faults), random.lacks, unfinished=unfinished)


def _state(accelerator: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Save or load a state, under FSDP2 as without it: accelerate would save the whole base.

    Under DeepSpeed its files stay, without the base.
    """
    for model in prepared_models(accelerator):
        if is_our_engine(model):
            leave_base_out(model)
    with contextlib.ExitStack() as stack:
        if accelerator.is_fsdp2 and all(
            find(model) is not None for model in prepared_models(accelerator)
        ):
            stack.enter_context(as_without_fsdp(accelerator))
            stack.enter_context(whole_states(*prepared_optimizers(accelerator)))
        return original(*args, **kwargs)
