"""Merging on a live model: exact to one rounding, and undone to the byte."""

from collections.abc import Iterable

import torch
from torch import nn

from hf_lora.errors import AdapterFileError, StateError, TargetError, listing
from hf_lora.layers.merging import merge_copies, merge_fault, merge_layer
from hf_lora.model.patch import unpatch
from hf_lora.model.registry import Registry, wrapped


def merge(model: nn.Module, names: str | Iterable[str] | None = None) -> nn.Module:
    """Put the active adapters into the weights, so that the model runs at the base's speed.

    Their updates are added up in float32 and rounded once. The base's own Parameters are kept
    aside, not written to, so :func:`unmerge` gives the exact bytes back; the price is a second copy
    of the merged weights while the model is merged. A tied output head is untied.

    Args:
        model: A wrapped model.
        names: Adapters to merge instead of the active ones.

    Returns:
        The same model.

    Raises:
        StateError: Merged already, or nothing to merge.
        TargetError: A layer's weight cannot be merged into (quantized), or an update is not
            finite; the model is as it was.
    """
    inner, registry = wrapped(model)
    registry.check_unmerged("merge again")
    chosen = registry.routing.active if names is None else registry.select(names)
    if not chosen:
        raise StateError("No adapter is active, so there is nothing to merge.")
    _check(registry, chosen)
    try:
        for path, layer in registry.layers.items():
            if any(name in layer.lora_slots for name in chosen):
                registry.originals.append((layer, merge_layer(layer, chosen)))
                _check_finite(path, layer)
        for module in registry.copies.values():
            for name in chosen:
                if name in module.lora_copies:
                    registry.originals.append((module, merge_copies(module, name)))
    except BaseException:
        registry.put_weights_back(inner)
        raise
    registry.routing.merged = chosen
    _untie(inner, registry)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Take the adapters out of the weights again: the base's own tensors, byte for byte.

    Raises:
        StateError: The model is not merged.
    """
    inner, registry = wrapped(model)
    if not registry.routing.merged:
        raise StateError("This model is not merged, so there is nothing to unmerge.")
    registry.put_weights_back(inner)
    return model


def merge_and_unwrap(model: nn.Module) -> nn.Module:
    """Merge the active adapters for good and give back a plain model without hf_lora.

    It saves in full and loads anywhere; the base's weights are gone from it.

    Raises:
        StateError, TargetError: As for :func:`merge`.
    """
    inner, registry = wrapped(model)
    if not registry.routing.merged:
        merge(inner)
    registry.originals.clear()
    registry.tied_before_merge = None
    registry.routing.merged = ()
    return unpatch(inner)


def _check(registry: Registry, chosen: tuple[str, ...]) -> None:
    faults = {
        path: merge_fault(layer)
        for path, layer in registry.layers.items()
        if any(name in layer.lora_slots for name in chosen)
    }
    problems = [f"{path}: {fault}" for path, fault in faults.items() if fault]
    if problems:
        raise TargetError(
            listing(
                "These layers cannot be merged into",
                problems,
                "Load the base unquantized, load the adapter onto it, and merge that.",
            )
        )


def _check_finite(path: str, layer: nn.Module) -> None:
    weight = layer._parameters["weight"]
    assert weight is not None
    if not torch.isfinite(weight).all():
        raise AdapterFileError(f"{path}: the merged weight is not finite ({weight.dtype}).")


def _untie(model: nn.Module, registry: Registry) -> None:
    """Tell the model's configuration if a merge gave two tied modules weights of their own."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    embeddings = [
        getter() if callable(getter := getattr(model, name, None)) else None
        for name in ("get_input_embeddings", "get_output_embeddings")
    ]
    changed = {id(module) for module, _ in registry.originals}
    if any(module is not None and id(module) in changed for module in embeddings):
        registry.tied_before_merge = True
        config.tie_word_embeddings = False
