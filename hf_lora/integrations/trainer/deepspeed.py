"""Checkpoints under DeepSpeed: beside the adapter, DeepSpeed's own files without the base.

DeepSpeed steps copies of the parameters that it keeps in its optimizer, so a run goes on from the
files that it writes itself. It would put the whole frozen base into each of them. Here the engine
that is made for one of our models leaves that out, and what it has loaded is compared with the
adapter's own file.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from hf_lora.adapter_io.load import check_values
from hf_lora.adapter_io.restore import adapters_of_checkpoint
from hf_lora.compat.deepspeed import is_engine
from hf_lora.compat.libraries import is_pretrained
from hf_lora.model.registry import find, wrapped


def is_our_engine(model: Any) -> bool:
    """Say whether an object is DeepSpeed's around a model of ours."""
    return is_engine(model) and isinstance(model, nn.Module) and find(model) is not None


def leave_base_out(engine: Any) -> None:
    """Make an engine save, and load, what trains alone."""
    save, load = type(engine).save_checkpoint, type(engine).load_checkpoint
    engine.save_checkpoint = functools.partial(save, engine, exclude_frozen_parameters=True)
    engine.load_checkpoint = functools.partial(_load, functools.partial(load, engine))


def _load(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # strictly, it would want the base
    return original(*args, **{**kwargs, "load_module_strict": False})


@contextlib.contextmanager
def engines_without_base(accelerator: Any) -> Iterator[None]:
    """Make the engines that ``accelerator.prepare`` returns inside leave the base out."""
    original = accelerator.prepare

    def prepare(*args: Any, **kwargs: Any) -> Any:
        prepared = original(*args, **kwargs)
        for item in prepared if isinstance(prepared, (tuple, list)) else (prepared,):
            if is_our_engine(item) and is_pretrained(wrapped(item)[0]):
                leave_base_out(item)
        return prepared

    before = vars(accelerator).copy()
    accelerator.prepare = prepare
    try:
        yield
    finally:
        del accelerator.prepare
        vars(accelerator).update({k: v for k, v in before.items() if k == "prepare"})


def check_loaded(model: nn.Module, checkpoint: str | Path) -> None:
    """Raise unless a model's adapters are those of the checkpoint that DeepSpeed has loaded.

    Every process takes part.

    Raises:
        AdapterFileError, AdapterMismatchError: They are not; the difference is told.
    """
    inner, registry = wrapped(model)
    check_values(inner, registry, adapters_of_checkpoint(registry, checkpoint))
