"""Checkpoints of sentence-transformers' trainers: a row of modules, each in a folder of its own.

Their trainer loads a second model from the checkpoint and takes all of its tensors. Where the
checkpoint holds an adapter that second model is PEFT's (hence nothing fits), or, after
``enable_auto``, ours, on the base as it is on disk. Here nothing is loaded twice: a wrapped model
gets its adapter back, and every other module what it saved.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from hf_lora.adapter_io.restore import restore_checkpoint
from hf_lora.model.registry import find


def is_sentence_model(model: Any) -> bool:
    """Say whether a model is one of sentence-transformers', with a wrapped model in it."""
    model = _uncompiled(model)
    base = getattr(sys.modules.get("sentence_transformers.base.model"), "BaseModel", ())
    return isinstance(model, base) and any(_wrapped_in(module) for module in model.modules())


def restore_modules(model: Any, checkpoint: str | Path) -> None:
    """Give every module of a model what a checkpoint that was saved from it holds for it.

    Raises:
        AdapterFileError, AdapterMismatchError, StateError: As for ``restore_checkpoint``.
        RuntimeError: A module of sentence-transformers' own has other tensors than its file.
    """
    others, adapters = [], []
    for module, folder in _places(_uncompiled(model), Path(checkpoint)):
        inner = _wrapped_in(module)
        if inner is not None:
            adapters.append((inner, folder))
        elif module.state_dict():
            others.append((module, type(module).load(str(folder)).state_dict()))
    for inner, folder in adapters:
        restore_checkpoint(inner, folder)
    for module, state in others:
        module.load_state_dict(state)


def _places(model: nn.Module, folder: Path) -> Iterator[tuple[Any, Path]]:
    """Yield each module that saves itself, and where its part of a checkpoint is."""
    for index, module in enumerate(model.children()):
        first = index == 0 and getattr(module, "save_in_root", False)
        place = folder if first else folder / f"{index}_{type(module).__name__}"
        routes = getattr(module, "sub_modules", None)
        if routes is None:
            yield module, place
            continue
        seen = set()
        for name, row in routes.items():
            for number, part in enumerate(row):
                if id(part) not in seen:
                    seen.add(id(part))
                    yield part, place / f"{name}_{number}_{type(part).__name__}"


def _wrapped_in(module: nn.Module) -> nn.Module | None:
    """Return the wrapped model that a module of sentence-transformers' is made around, or None."""
    return next((child for child in module.children() if find(child) is not None), None)


def _uncompiled(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)
