"""Leaving a wrapped model for good with its adapters merged into it."""

from typing import TypeVar

from torch import nn

from hf_lora.hf.instance import uninstall
from hf_lora.merging.in_memory import merge_for_good
from hf_lora.model.choices import Names

Model = TypeVar("Model", bound=nn.Module)


def merge_and_unwrap(model: Model, names: Names | None = None) -> Model:
    """Merge the active adapters for good and give back a plain model without hf_lora.

    It saves in full and loads anywhere; the base's weights are gone from it.

    Args:
        model: A wrapped model.
        names: Adapters to merge instead of the active ones, or a mapping from each to a factor, as
            for :func:`hf_lora.activate`. What is merged already stays so.

    Returns:
        The model itself, also if a DDP or compiled wrapper of it was given.

    Raises:
        StateError, TargetError, ConfigError: As for :func:`hf_lora.merge`; the model is as it was.
    """
    inner = merge_for_good(model, names)
    uninstall(inner)
    return inner  # type: ignore[return-value]
