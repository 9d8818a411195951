"""Merging on a live model: exact to one rounding, and undone to the byte."""

import warnings
from collections.abc import Collection, Hashable
from typing import Any

import torch
from torch import nn

from hf_lora.compat.accelerate import present
from hf_lora.errors import HfLoRAWarning, StateError, TargetError, listing
from hf_lora.layers.choice import Weights
from hf_lora.layers.factors import Factored
from hf_lora.layers.replaced import Replaced, Tensors
from hf_lora.layers.requantize import Loss, requantize_fault, requantized
from hf_lora.merging.for_good import Later
from hf_lora.merging.untying import untie
from hf_lora.model.choices import Names, check_compatible, note_fresh, weigh
from hf_lora.model.registry import Registry, wrapped
from hf_lora.model.transaction import Transaction


def merge(model: nn.Module, names: Names | None = None, *, requantize: bool = False) -> nn.Module:
    """Put the active adapters into the weights, so that the model runs at the base's speed.

    Their updates are added up in float32 and rounded once. The base's own Parameters are kept
    aside, not written to, so :func:`unmerge` gives the exact bytes back; the price is a second copy
    of the merged weights while the model is merged. A tied output head is untied, unless it was
    trained in full together with the embeddings.

    Active adapters that are not merged go on being added in every forward. Adapters may be merged
    on top of others that are: what stands in the weights then is what merging all at once gives.

    Args:
        model: A wrapped model.
        names: Adapters to merge instead of the active ones, or a mapping from each to a factor, as
            for :func:`hf_lora.activate`. The active ones are merged with the factors that they
            have.
        requantize: Whether weights that bitsandbytes has packed in 4 bits, and packed experts, are
            unpacked, added to and packed again in the same way. An update is often smaller than
            what 4 bits can tell apart: a warning says how much of it is lost.

    Returns:
        The same model.

    Raises:
        UnknownAdapterError: One of the names is unknown.
        ConfigError: A factor is no finite number.
        TargetError: A layer cannot be merged into, for instance because it is quantized.
        StateError: Merged already, nothing to merge, a merged weight would not be finite, or
            another thread or task is in a block of :func:`hf_lora.use_adapter`.

    The model is as it was after any of these.
    """
    with Transaction(model) as change:
        put_in(model, names, requantize=requantize)
        change.commit()
    return model


def put_in(
    model: nn.Module,
    names: Names | None,
    later: Later | None = None,
    *,
    requantize: bool = False,
) -> None:
    """Do what :func:`merge` does, as a part of a change.

    Args:
        model: A wrapped model.
        names: As for :func:`merge`.
        later: Where to put what can be merged at the end, instead of doing it here.
        requantize: As for :func:`merge`.
    """
    inner, registry = wrapped(model)
    registry.settle_buffers()
    now = registry.routing.now()
    if names is None:
        chosen = now.live
    else:
        chosen = weigh(registry, names)
        note_fresh(inner, registry, chosen)
        registry.check_unmerged("merge again", (name for name, _ in chosen))
    if not chosen:
        registry.check_unmerged("merge again")
        raise StateError("No adapter is active, so there is nothing to merge.")
    if registry.routing.used_elsewhere():
        raise StateError(
            "Another thread or task is in a use_adapter or no_adapter block of this model, and its "
            "answers would change; merge when none is."
        )
    merged = (*now.merged, *chosen)
    check_compatible(registry, now.chosen, merged)
    registry.check_in_place(inner)
    packed = _check_layers(registry, {name for name, _ in chosen}, requantize)
    changed, untied = len(registry.originals), len(registry.untied)
    try:
        losses = _put_all(registry, {name for name, _ in chosen}, merged, later, packed)
        changed_now = {id(original.module) for original in registry.originals}
        registry.untied += untie(inner, changed_now)
    except BaseException:
        registry.put_weights_back(inner, changed, untied)
        raise
    registry.routing.merge(merged)
    _keep_first(registry)
    _tell(losses)


def unmerge(model: nn.Module) -> nn.Module:
    """Take the adapters out of the weights again: the base's own tensors, byte for byte.

    Raises:
        StateError: The model is not merged.
    """
    inner, registry = wrapped(model)
    if not registry.routing.merged:
        raise StateError("This model is not merged, so there is nothing to unmerge.")
    with Transaction(model, "adapted") as change:
        registry.put_weights_back(inner)
        change.commit()
    return model


def _check_layers(registry: Registry, chosen: set[str], requantize: bool) -> set[str]:
    """Return the paths of the layers that are packed again; raise if others cannot be merged."""
    problems, packed = [], set()
    for path, module in registry.modules.items():
        fault = module.lora_merge_fault() if chosen & set(module.lora_adapters()) else None
        if fault and requantize and isinstance(module, Factored):
            other = requantize_fault(module)
            if other is None:
                packed.add(path)
                continue
            fault = f"{fault}; {other}"
        if fault:
            problems.append(f"{path}: {fault}")
    if problems:
        raise TargetError(
            listing(
                "These layers cannot be merged into",
                problems,
                "Load a plain base into memory, load the adapter onto it, and merge that; or "
                "hf_lora.merge(model, requantize=True) rounds what bitsandbytes has packed in 4 "
                "bits anew, and says what is lost.",
            )
        )
    return packed


def _tell(losses: dict[str, Loss]) -> None:
    if losses:
        whole = Loss(*map(sum, zip(*losses.values(), strict=True)))
        worst = max(losses, key=lambda path: losses[path].share)
        warnings.warn(
            f"{len(losses)} packed layers were merged into and rounded anew: the error is "
            f"{whole.share:.0%} of the update (most: {losses[worst].share:.0%} in {worst}; 100% is "
            "what the base without the adapter has). Not merged, nothing is lost.",
            HfLoRAWarning,
            stacklevel=4,
        )


def _put_all(
    registry: Registry,
    chosen: set[str],
    merged: Weights,
    later: Later | None,
    packed: Collection[str],
) -> dict[str, Loss]:
    """Put ``merged`` into every module that one of ``chosen`` is on.

    Returns:
        What is lost in those that are ``packed`` again.
    """
    problems, losses = [], {}
    made: dict[Hashable, torch.Tensor] = {}
    before = {id(original.module): original for original in registry.originals}

    def own(module: nn.Module, name: str) -> Any:
        kept = before[id(module)].read(name) if id(module) in before else None
        return module._buffers[name] if kept is None else kept

    buffers = {id(m): (m, found) for m, found in registry.buffers.merged(chosen, merged, own)}
    for path, module in registry.modules.items():
        if path in packed:
            assert isinstance(module, Factored)
            tensors, losses[path] = requantized(module, merged, before.get(id(module)))
            _, moved = buffers.pop(id(module), (module, {}))
            _replace(registry, module, tensors | moved)
        elif chosen & set(module.lora_adapters()):
            if later is not None and later.take(module, merged, before.get(id(module))):
                tensors = module.lora_merged_beside(merged, before.get(id(module)))
                _, moved = buffers.pop(id(module), (module, {}))
                _replace(registry, module, tensors | moved)
                continue
            with present(module):
                tensors = module.lora_merged(merged, before.get(id(module)))
                fault = module.lora_merge_damage(tensors)
                for role, tensor in tensors.items():  # what is tied, and was read as one, stays so
                    of = module.lora_made_of(role, merged)
                    tensors[role] = tensor if of is None else made.setdefault(of, tensor)
            if fault:
                problems.append(f"{path}: {fault}")
            _, moved = buffers.pop(id(module), (module, {}))
            _replace(registry, module, tensors | moved)
    for module, moved in buffers.values():
        _replace(registry, module, moved)
    if problems:
        raise StateError(listing("This merge would break the model", problems))
    return losses


def _replace(registry: Registry, module: nn.Module, merged: Tensors) -> None:
    original = Replaced(module)
    registry.originals.append(original)
    original.replace(merged)


def _keep_first(registry: Registry) -> None:
    """Keep what stood in a module before all merges, not what the merges before the last put."""
    first: dict[int, Replaced] = {}
    for original in registry.originals:
        first.setdefault(id(original.module), original)
    registry.originals[:] = first.values()
