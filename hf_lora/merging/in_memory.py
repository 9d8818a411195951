"""Merging on a live model: exact to one rounding, and undone to the byte."""

import contextlib
from collections.abc import Iterable

from torch import nn

from hf_lora.devices import present
from hf_lora.errors import StateError, TargetError, listing
from hf_lora.layers.merging import (
    Original,
    Tensors,
    merge_fault,
    merged_copies,
    merged_weight,
    not_finite,
)
from hf_lora.layers.trained import own_tensors
from hf_lora.model.adapters import check_compatible
from hf_lora.model.patch import unpatch
from hf_lora.model.registry import Registry, wrapped
from hf_lora.sharding import in_parts


def merge(model: nn.Module, names: str | Iterable[str] | None = None) -> nn.Module:
    """Put the active adapters into the weights, so that the model runs at the base's speed.

    Their updates are added up in float32 and rounded once. The base's own Parameters are kept
    aside, not written to, so :func:`unmerge` gives the exact bytes back; the price is a second copy
    of the merged weights while the model is merged. A tied output head is untied.

    Active adapters that are not merged go on being added in every forward.

    Args:
        model: A wrapped model.
        names: Adapters to merge instead of the active ones.

    Returns:
        The same model.

    Raises:
        UnknownAdapterError: One of the names is unknown.
        TargetError: A layer cannot be merged into, for instance because it is quantized.
        StateError: Merged already, nothing to merge, or a merged weight would not be finite.

    The model is as it was after any of these.
    """
    inner, registry = wrapped(model)
    registry.check_unmerged("merge again")
    chosen = registry.routing.active if names is None else registry.select(names)
    if not chosen:
        raise StateError("No adapter is active, so there is nothing to merge.")
    check_compatible(registry, (*chosen, *registry.routing.active))
    registry.check_in_place(inner)
    _check_layers(registry, chosen)
    try:
        _put_all(registry, chosen)
        _untie(inner, registry)
    except BaseException:
        registry.put_weights_back(inner)
        raise
    registry.routing.merged = chosen
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


def bake(model: nn.Module) -> nn.Module:
    """Merge for good, and take the patch off; see :func:`hf_lora.merge_and_unwrap`."""
    inner, registry = wrapped(model)
    if not registry.routing.merged:
        merge(inner)
    registry.keep_merged()
    return unpatch(inner)


def _check_layers(registry: Registry, chosen: tuple[str, ...]) -> None:
    problems = [
        f"{path}: {fault}"
        for path, layer in registry.layers.items()
        if any(name in layer.lora_slots for name in chosen) and (fault := merge_fault(layer))
    ]
    problems += [
        f"{path}: its tensors are spread over several processes"
        for path, module in registry.copies.items()
        if any(in_parts(tensor) for _, tensor in own_tensors(module, module.lora_names))
    ]
    if problems:
        raise TargetError(
            listing(
                "These layers cannot be merged into",
                problems,
                "Load a plain base into memory, load the adapter onto it, and merge that.",
            )
        )


def _put_all(registry: Registry, chosen: tuple[str, ...]) -> None:
    problems = []
    for path, layer in registry.layers.items():
        if any(name in layer.lora_slots for name in chosen):
            with present(layer):
                merged = merged_weight(layer, chosen)
                fault = not_finite(layer, merged)
            if fault:
                problems.append(f"{path}: {fault}")
            _replace(registry, layer, merged)
    for module in registry.copies.values():
        for name in chosen:
            if name in module.lora_copies:
                _replace(registry, module, merged_copies(module, name))
    if problems:
        raise StateError(listing("This merge would break the model", problems))


def _replace(registry: Registry, module: nn.Module, merged: Tensors) -> None:
    original = Original(module)
    registry.originals.append(original)
    original.replace(merged)


def _untie(model: nn.Module, registry: Registry) -> None:
    """Tell configurations that say so if two tied embeddings have weights of their own now."""
    changed = {id(original.module) for original in registry.originals}
    for part in model.modules():
        config = getattr(part, "config", None)
        if getattr(config, "tie_word_embeddings", False) is True and _embeddings(part) & changed:
            registry.untied.append(config)
            config.tie_word_embeddings = False  # type: ignore[union-attr]


def _embeddings(model: nn.Module) -> set[int]:
    found = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getter = getattr(model, name, None)
        if callable(getter):
            # transformers raises where a model has none that it knows of
            with contextlib.suppress(NotImplementedError, AttributeError):
                found.add(id(getter()))
    return found
