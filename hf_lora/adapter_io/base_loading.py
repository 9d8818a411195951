"""Loading the base model that an adapter asks for, as the class that the adapter was trained on."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from hf_lora.adapter_io.rename import rename
from hf_lora.adapter_io.tasks import BY_PEFT, class_for, class_in
from hf_lora.errors import AdapterFileError, AdapterMismatchError, BaseLoadError
from hf_lora.files.read import AdapterFolder
from hf_lora.layers.trained import tensor_names
from hf_lora.text import show

_CONFIG_KWARGS = (
    "revision", "token", "cache_dir", "local_files_only", "gguf_file", "subfolder",
    "trust_remote_code",
)  # fmt: skip
_FOLDER = re.compile(r"[~/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]")
"""How a path begins that can be no id on the Hub."""


def load_base(
    adapter: AdapterFolder, base: str, model_class: Any, model_kwargs: dict[str, Any]
) -> tuple[Any, str]:
    """Load the base model of an adapter.

    Args:
        adapter: The adapter.
        base: Folder or id: what the adapter names, or what was given instead.
        model_class: What loads it; None for the class that fits the adapter.
        model_kwargs: Handed to its ``from_pretrained``.

    Returns:
        The model, and how its class was chosen, in words.

    Raises:
        BaseLoadError: It cannot be found or loaded.
        AdapterFileError: No class is known for it.
    """
    if is_gone(base):
        raise BaseLoadError(_words(adapter, base, "there is no such folder here"))
    try:
        if model_class is not None:
            return model_class.from_pretrained(base, **model_kwargs), "given as model_class"
        kwargs = {name: model_kwargs[name] for name in _CONFIG_KWARGS if name in model_kwargs}
        try:
            config = transformers.AutoConfig.from_pretrained(base, **kwargs)
        except ValueError as error:
            raise BaseLoadError(_words(adapter, base, str(error))) from error
        loader, why = choose_class(adapter, base, config)
        return loader.from_pretrained(base, **model_kwargs), why
    except OSError as error:
        if isinstance(error, BaseLoadError):
            raise
        raise BaseLoadError(_words(adapter, base, str(error))) from error


def choose_class(adapter: AdapterFolder, base: str, config: Any) -> tuple[Any, str]:
    """Return what loads the base for an adapter, and why, in words.

    That is the auto class of the adapter's task where it has a class for such a configuration;
    else the class that the file names; else the one that the base was saved from. Of several the
    first that has every module under the very name that the file uses.

    Raises:
        AdapterFileError: There is none.
    """
    found = dict(_candidates(adapter, config))
    if not found:
        task, mapping = (adapter.fields.get(name) for name in ("task_type", "auto_mapping"))
        named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        saved_from = ", ".join(config.architectures or ()) or "a class that it does not name"
        raise AdapterFileError(
            f"transformers has no class that {adapter.directory} could be for: its task is "
            f"{show(task)}, the class that it names {show(named)}, and its base {base} was saved "
            f"from {saved_from}; pass model_class=..."
        )
    if len(found) == 1:
        return next(iter(found.values()))
    made = max(found, key=lambda kind: _fit(adapter, kind, config))
    return found[made]


def other_class(error: AdapterMismatchError, model: nn.Module, why: str) -> AdapterMismatchError:
    """Return the error of an adapter that does not fit the class that was chosen for its base."""
    words = f"The base was loaded as {type(model).__name__} ({why}); another class: model_class=..."
    return type(error)(f"{error}\n{words}")


def _candidates(
    adapter: AdapterFolder, config: Any
) -> Iterator[tuple[type[nn.Module] | str, tuple[Any, str]]]:
    """Yield classes that may be the adapter's, the likeliest first: class to what loads it, why."""
    word = adapter.fields.get("task_type")
    task = BY_PEFT.get(word) if isinstance(word, str) else None
    remote = getattr(config, "auto_map", None) or {}
    if task is not None and task.loader in remote:
        yield task.loader, (getattr(transformers, task.loader), f"the task is {word}")
        return
    seen = set()
    for loader in (task.loader, *task.also) if task is not None else ():
        made = class_in(loader, config)
        if made is not None and made not in seen:
            seen.add(made)
            yield made, (getattr(transformers, loader), f"the task is {word}")
    mapping = adapter.fields.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) and not task else None
    saved = next(iter(config.architectures or ()), None)
    for name, why in ((named, "the adapter names it"), (saved, "the base was saved from it")):
        made = class_for(name, config)
        if made is not None and made not in seen:
            seen.add(made)
            yield made, (made, why)


def _fit(adapter: AdapterFolder, kind: Any, config: Any) -> int:
    """Return how well a class fits: 2 if it has all names of the file, 1 under other names."""
    if kind.config_class is not type(config):
        parts = (getattr(config, name, None) for name in config.sub_configs)
        config = next((part for part in parts if isinstance(part, kind.config_class)), config)
    with torch.device("meta"):
        model = kind(config)
    owned = (
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in tensor_names(module)
    )
    known = {*dict(model.named_modules()), *owned}
    names = rename(adapter.factors, adapter.others, known, model)
    everywhere = all(names.module(name) in known for name in adapter.factors) and all(
        names.tensor(name) in known for name in adapter.others
    )
    return (1 if names.way.words else 2) if everywhere else 0


def is_gone(base: str) -> bool:
    """Say whether a base's name is that of a folder which is not here."""
    if os.path.isdir(base):
        return False
    if _FOLDER.match(base) or Path(base).is_absolute():
        return True
    try:
        validate_repo_id(base)
    except HFValidationError:
        return True
    return False


def _words(adapter: AdapterFolder, base: str, fault: str) -> str:
    asks = "asks for" if base == adapter.base else "was given"
    at = f" at revision {adapter.revision}" if adapter.revision and base == adapter.base else ""
    shown = f"'{base}'" if base.isprintable() else show(base)  # a Windows path as it is typed
    return (
        f"The adapter {adapter.directory} {asks} the base model {shown}{at}, which cannot be "
        f"loaded: {fault}\nName it where it is now: hf_lora.from_pretrained(source, base=...) "
        "takes a folder, an id or a model; or load it yourself and call hf_lora.load(model, "
        "source)."
    )
