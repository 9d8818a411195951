"""Opt-in: ``AutoModelForX.from_pretrained(adapter)`` attaches the adapter through hf_lora.

transformers asks whether peft is there before it looks for an adapter, in two of its modules, and
then calls ``model.load_adapter``. Both are pointed at hf_lora, and can be pointed back.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import peft as peft_integration
from transformers.models.auto import auto_factory

from hf_lora.hf.wrapping import load

_SWITCH = "is_peft_available"
_saved: list[tuple[Any, str, Any]] = []


def enable_auto() -> None:
    """Let transformers' auto classes load adapter folders and repos, through hf_lora.

    From then on ``AutoModelForCausalLM.from_pretrained("me/my-adapter")`` loads the base that the
    adapter names and attaches it as :func:`hf_lora.load` does, whether or not peft is installed.
    Global to the process; :func:`disable_auto` undoes it.
    """
    if _saved:
        return
    for owner, name, value in (
        (auto_factory, _SWITCH, lambda: True),
        (peft_integration, _SWITCH, lambda: True),
        (PreTrainedModel, "load_adapter", _load_adapter),
    ):
        _saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


def disable_auto() -> None:
    """Undo :func:`enable_auto`."""
    while _saved:
        owner, name, value = _saved.pop()
        setattr(owner, name, value)


def _load_adapter(
    model: nn.Module,
    peft_model_id: str,
    adapter_name: str | None = None,
    *,
    load_config: Any = None,
    adapter_kwargs: dict[str, Any] | None = None,
    is_trainable: bool = False,
    **kwargs: Any,
) -> None:
    """Attach an adapter with the arguments that ``from_pretrained`` passes."""
    options = {**(adapter_kwargs or {}), **kwargs}
    chosen = {name: options.pop(name) for name in _OPTIONS if name in options}
    load(model, peft_model_id, adapter=adapter_name or "default", trainable=is_trainable, **chosen)


_OPTIONS = ("revision", "subfolder", "token")
