"""Telling a configuration that two embeddings are no longer one."""

import contextlib
from collections.abc import Collection
from typing import Any

from torch import nn

from hf_lora.layers.kind import parameter_of


def untie(model: nn.Module, changed: Collection[int]) -> list[Any]:
    """Tell configurations that say so if two tied embeddings have weights of their own now.

    Args:
        model: The model.
        changed: The ids of the modules that have other tensors now.

    Returns:
        The configurations that were told.
    """
    told = []
    for part in model.modules():
        config = getattr(part, "config", None)
        said = getattr(config, "tie_word_embeddings", False) is True
        ends = _embeddings(part) if said else []
        weights = {id(parameter_of(end, "weight")) for end in ends}
        if len(weights) > 1 and any(id(end) in changed for end in ends):
            told.append(config)
            config.tie_word_embeddings = False  # type: ignore[union-attr]
    return told


def _embeddings(model: nn.Module) -> list[nn.Module]:
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getter = getattr(model, name, None)
        if callable(getter):
            # transformers raises where a model has none that it knows of
            with contextlib.suppress(NotImplementedError, AttributeError):
                end = getter()
                found += [end] if isinstance(end, nn.Module) else []
    return found
