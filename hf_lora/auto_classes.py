"""Opt-in: ``AutoModelForX.from_pretrained(adapter)`` attaches the adapter through hf_lora.

transformers asks whether peft is there before it looks for an adapter, in three of its modules, and
then calls ``model.load_adapter``. All are pointed at hf_lora, and can be pointed back.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from hf_lora.api import load
from hf_lora.integrations.import_hooks import cancel, when_imported
from hf_lora.layers.names import DEFAULT

_saved: list[tuple[Any, str, Any]] = []


def enable_auto() -> None:
    """Let transformers' auto classes and pipelines load adapter folders and repos, through hf_lora.

    From then on ``AutoModelForCausalLM.from_pretrained("me/my-adapter")`` loads the base that the
    adapter names and attaches it as :func:`hf_lora.load` does, whether or not peft is installed.
    Global to the process; :func:`disable_auto` undoes it.
    """
    for name in _REPLACED:
        when_imported(name, _replace)


def disable_auto() -> None:
    """Undo :func:`enable_auto`."""
    for name in _REPLACED:
        cancel(name, _replace)
    while _saved:
        owner, name, value = _saved.pop()
        setattr(owner, name, value)


def _replace(module: ModuleType) -> None:
    class_name, name, ours = _REPLACED[module.__name__]
    owner = getattr(module, class_name) if class_name else module
    if getattr(owner, name) is not ours:
        _saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, ours)


def _yes() -> bool:
    """Answer whether adapters can be loaded."""
    return True


def _load_adapter(
    model: nn.Module,
    peft_model_id: str,
    adapter_name: str | None = None,
    *,
    load_config: Any = None,
    adapter_kwargs: dict[str, Any] | None = None,
    is_trainable: bool = False,
    **kwargs: Any,
) -> Any:
    """Attach an adapter with the arguments that ``from_pretrained`` passes.

    Returns what it wants to know of the load: nothing was missing, or there was an error.
    """
    from transformers.utils.loading_report import LoadStateDictInfo

    options = {**(adapter_kwargs or {}), **kwargs}
    chosen = {name: options.pop(name) for name in _OPTIONS if name in options}
    unknown = [name for name, value in options.items() if value]
    if unknown:
        raise TypeError(f"hf_lora cannot load an adapter with {', '.join(unknown)}")
    load(model, peft_model_id, adapter=adapter_name or DEFAULT, trainable=is_trainable, **chosen)
    return LoadStateDictInfo(set(), set(), set(), [], {}, set())


_OPTIONS = ("revision", "subfolder", "token")
_REPLACED: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "transformers.models.auto.auto_factory": ("", "is_peft_available", _yes),
    "transformers.integrations.peft": ("", "is_peft_available", _yes),
    "transformers.pipelines": ("", "is_peft_available", _yes),
    "transformers.modeling_utils": ("PreTrainedModel", "load_adapter", _load_adapter),
}
