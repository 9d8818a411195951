"""Modules that stand in several places of a model: one object, more than one name.

We patch the object, so that an adapter acts wherever it is called. PEFT puts a new module into the
first place and leaves the others as they are; a file of the one means something else to the other.
"""

from collections.abc import Iterable

from torch import nn


def several_places(model: nn.Module) -> dict[str, list[str]]:
    """Return the first path of each module that stands in several places, to the further ones.

    What is inside of such a module has one place, in it.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    places: dict[int, list[str]] = {}
    for above, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append(f"{above}.{name}" if above else name)
    return {
        paths[which]: [name for name in names if name != paths[which]]
        for which, names in places.items()
        if len(names) > 1
    }


def adapted_twice(model: nn.Module, slots: Iterable[str], trained: Iterable[str]) -> list[str]:
    """Return a line for each module of an adapter that stands in several places.

    Args:
        model: The model.
        slots: Paths of the layers with factors.
        trained: Paths of the modules that are trained in full, with everything below them.
    """
    twice = several_places(model)
    if not twice:
        return []
    below = {
        ".".join(filter(None, (top, path)))
        for top in trained
        for path, part in model.get_submodule(top).named_modules()
        if next(part.parameters(recurse=False), None) is not None
    }
    shown = [path for path in twice if path in below or path in set(slots)]
    return [f"{path} is also {', '.join(twice[path])}" for path in shown]
