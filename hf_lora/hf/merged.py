"""Leaving a wrapped model for good with its adapters merged into it."""

from typing import TypeVar

from torch import nn

from hf_lora.hf.instance import uninstall
from hf_lora.merging.in_memory import bake

Model = TypeVar("Model", bound=nn.Module)


def merge_and_unwrap(model: Model) -> Model:
    """Merge the active adapters for good and give back a plain model without hf_lora.

    It saves in full and loads anywhere; the base's weights are gone from it.

    Returns:
        The model itself, also if a DDP or compiled wrapper of it was given.

    Raises:
        StateError, TargetError: As for :func:`hf_lora.merge`; the model is as it was.
    """
    inner = bake(model)
    uninstall(inner)
    return inner  # type: ignore[return-value]
