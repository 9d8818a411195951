"""The model whose adapters are meant: a wrapped one, or one of which a single part is wrapped.

``wrap(vlm.model.language_model)`` leaves the outer model a plain one to its library. What trains or
saves the outer model shall still mean the adapter, under its names in the outer model.
"""

import dataclasses
from collections.abc import Iterator

from torch import nn

from hf_lora.errors import StateError, listing
from hf_lora.layers.kind import Patched
from hf_lora.model.registry import Registry, find, is_wrapped
from hf_lora.planning.ties import Owners, groups
from hf_lora.targets import inside

Found = tuple[nn.Module, Registry]


def owner(model: nn.Module) -> Found | None:
    """Return the wrapped model and its registry; or, of one with a wrapped part, as seen from it.

    The latter registry is for reading and for filling tensors: what adds adapters or takes them
    away belongs to the part. None if nothing is wrapped, or several parts are.
    """
    found = find(model)
    if found is not None:
        return found
    parts = wrapped_parts(model)
    if len(parts) != 1:
        return None
    ((path, part),) = parts.items()
    _, registry = find(part)  # type: ignore[misc]
    return model, _seen_from_above(registry, path)


def settled(model: nn.Module) -> Found | None:
    """Return the same, with each buffer that a training has moved given to the adapter's."""
    found = owner(model)
    if found is not None:
        found[1].settle_buffers()
    return owner(model)


def wrapped_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the path and the module of each wrapped part of a model."""
    return {path: module for path, module in model.named_modules() if is_wrapped(module)}


def holder_of(model: nn.Module) -> nn.Module:
    """Return the module that carries the registry that :func:`owner` found."""
    return model if find(model) is not None else next(iter(wrapped_parts(model).values()))


def check_saves_as_one(model: nn.Module) -> None:
    """Raise StateError if saving this model by its library's own method would lose an adapter.

    That is so where several parts are wrapped, or where the wrapped model is around this one.
    """
    if find(model) is not None:
        return
    parts = list(wrapped_parts(model))
    kind = type(model).__name__
    if len(parts) > 1:
        raise StateError(
            f"{' and '.join(parts)} of this {kind} are wrapped each by itself, and saving it would "
            "write everything in full, under names that nothing loads. Wrap the whole model once, "
            f"or save each part: hf_lora.save(model.{parts[0]}, folder)."
        )
    patched = [path for path, module in model.named_modules() if isinstance(module, Patched)]
    if patched and not parts:
        raise StateError(
            f"{patched[0] or 'This layer'} of this {kind} carries an adapter of a model around it, "
            "and saving this part would write everything in full, under names that nothing loads. "
            "Save the model around it: hf_lora.save(model, folder)."
        )


def check_rest_frozen(model: nn.Module, registry: Registry) -> None:
    """Raise StateError if more of a model trains than the wrapped part of it, by name.

    Or if it should: what is tied with a module that is trained in full, and stands outside.
    """
    if find(model) is not None:
        return
    apart = dict(_tied_across(model, registry))
    if apart:
        raise StateError(
            listing(
                f"A part of this {type(model).__name__} is wrapped, and these outside of it share "
                "a tensor of a module that is trained in full, or in some rows, and go on with the "
                "base's",
                (f"{path} is tied with {other}" for path, other in apart.items()),
                "Wrap the whole model instead.",
            )
        )
    ours = registry.all_parameters()
    trains = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if trains:
        raise StateError(
            listing(
                f"A part of this {type(model).__name__} is wrapped, what is saved of it is the "
                "adapter, and this trains outside of it and would be lost",
                trains,
                "Freeze it (requires_grad_(False)), or wrap the whole model, with train=[...].",
            )
        )


def _tied_across(model: nn.Module, registry: Registry) -> Iterator[tuple[str, str]]:
    """Yield each module outside of the wrapped part that is tied with a trained one, and that."""
    part = tuple(wrapped_parts(model))
    owners = Owners(model, registry.adapted().stood)
    for adapter in registry.adapters.values():
        for places in groups(owners.ties(adapter.trained)):
            own = next(path for path, _ in places if inside(path, adapter.trained))
            yield from ((path, own) for path, _ in places if not inside(path, part))
        for path in adapter.rows:
            others = owners.others([(path, "weight")], path)
            yield from ((other, path) for other in others if not inside(other, part))


def _seen_from_above(registry: Registry, path: str) -> Registry:
    def at(below: str) -> str:
        return f"{path}.{below}" if below else path

    adapters = {
        name: dataclasses.replace(
            adapter,
            slots={at(below): slot for below, slot in adapter.slots.items()},
            trained=tuple(map(at, adapter.trained)),
            biases=tuple(map(at, adapter.biases)),
            rows={
                at(below): dataclasses.replace(rows, of=None if rows.of is None else at(rows.of))
                for below, rows in adapter.rows.items()
            },
            ties={
                (at(path), role): (at(first), source)
                for (path, role), (first, source) in adapter.ties.items()
            },
            places=dict.fromkeys(map(at, adapter.places)),
            origin={},  # of the part's file: task and class are the outer model's own here
        )
        for name, adapter in registry.adapters.items()
    }
    return dataclasses.replace(
        registry,
        adapters=adapters,
        modules={at(below): module for below, module in registry.modules.items()},
        exclusive={at(below): module for below, module in registry.exclusive.items()},
        rows={at(below): module for below, module in registry.rows.items()},
        base_flags={at(below): flag for below, flag in registry.base_flags.items()},
        part=(path, registry),
    )
