"""Arguments of a forward that mean something to other LoRA libraries, and would be ignored here."""

import inspect
from typing import Any

from torch import nn

from hf_lora.errors import ConfigError

_SCALES = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""In which diffusers passes the strength of its adapters, as ``scale``."""


def check_arguments(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise for an argument that the model would take and nobody honour.

    Raises:
        ConfigError: ``adapter_names`` (PEFT's choice of an adapter for each row), or a scale.
    """
    if "adapter_names" in kwargs and not _has(model, "adapter_names"):
        raise ConfigError(
            f"{type(model).__name__} has no use for adapter_names={kwargs['adapter_names']!r}: one "
            "choice of adapters holds for all rows of a batch. Run the rows of each adapter inside "
            "of hf_lora.use_adapter(model, name)."
        )
    for name in _SCALES:
        scale = kwargs[name].get("scale", 1) if isinstance(kwargs.get(name), dict) else 1
        if scale != 1:
            raise ConfigError(
                f"{name}={{'scale': {scale!r}}} would not reach hf_lora's adapters; use "
                f"hf_lora.use_adapter(model, {{'default': {scale!r}}}) or hf_lora.activate."
            )


def _has(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
