"""Which modules of a model share a tensor, and which of them follow one that is trained in full.

A tie stays a tie: where a trained module shares a parameter with others, an adapter has one copy of
it, which all of them read. Of the others nothing else trains.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import nn

from hf_lora.layers.roles import Place, Ties
from hf_lora.layers.trained import own_parameters, parts_with_tensors, train_fault
from hf_lora.targets import inside

NOTHING_MERGED: Mapping[int, Mapping[str, torch.Tensor]] = MappingProxyType({})


class Owners:
    """Which modules share which of the base's parameters.

    Args:
        model: The model.
        stood: Of each module that a merge has changed, by its id, what stood there before.
    """

    def __init__(
        self, model: nn.Module, stood: Mapping[int, Mapping[str, torch.Tensor]] = NOTHING_MERGED
    ):
        self._modules = dict(model.named_modules())
        everything = {
            full_name((path, name)): ((path, name), tensor)
            for path, module in self._modules.items()
            for name, tensor in own_parameters(module)
        }
        # on the meta device nothing is tied yet; transformers says what will be
        said = getattr(model, "all_tied_weights_keys", None)
        will_be = said if isinstance(said, dict) else {}
        self._places: dict[int, list[Place]] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._same: dict[Place, int] = {}
        for full, ((path, name), tensor) in everything.items():
            source = everything.get(will_be.get(full, full)) if tensor.is_meta else None
            shared = source[1] if source else tensor
            shared = stood.get(id(self._modules[path]), {}).get(name, shared)
            self._same[path, name] = id(shared)
            self._tensors.setdefault(id(shared), shared)
            self._places.setdefault(id(shared), []).append((path, name))

    def tensors(self) -> Iterable[torch.Tensor]:
        """Return each parameter once."""
        return self._tensors.values()

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each parameter once, under its first name."""
        return ((full_name(self._places[each][0]), t) for each, t in self._tensors.items())

    def outside(
        self, adapted: Mapping[str, Collection[str]], trained: Collection[str]
    ) -> Iterator[torch.Tensor]:
        """Yield each parameter that nothing reaches, under any of its names.

        Args:
            adapted: Path of a module to the names of its parameters that are; none stands for all.
            trained: Paths of the modules that are trained in full.
        """
        for each, tensor in self._tensors.items():
            places = self._places[each]
            reached = any(
                inside(path, trained)
                or (path in adapted and (not adapted[path] or name in adapted[path]))
                for path, name in places
            )
            if not reached:
                yield tensor

    def others(self, places: Iterable[Place], path: str) -> tuple[str, ...]:
        """Return the paths outside of ``path`` of modules that share one of these parameters."""
        found = {
            other
            for place in places
            for other, _ in self._places.get(self._same.get(place, 0), ())
            if not inside(other, (path,)) and other != path
        }
        return tuple(sorted(found))

    def ties(self, tops: Iterable[str]) -> dict[Place, Place]:
        """Return what has one copy together if the modules at ``tops`` are trained in full.

        The copy belongs to the first in the model's order, under whose name ``named_parameters``
        has it.
        """
        trained = {
            id(part): path
            for top in tops
            for path, part in parts_with_tensors(self._modules[top], top)
        }
        found: dict[Place, Place] = {}
        for places in self._places.values():
            modules = [id(self._modules[path]) for path, _ in places]
            if len(places) > 1 and any(module in trained for module in modules):
                # a module that stands in several places may be trained under a further path
                first, *others = (
                    (trained.get(module, path), role)
                    for module, (path, role) in zip(modules, places, strict=True)
                )
                found |= dict.fromkeys(others, first)
        return found

    def faults(self, ties: Ties, tops: Collection[str], taken: Collection[str]) -> Iterator[str]:
        """Yield a line for each module that cannot follow the trained one that it is tied with.

        Args:
            ties: What is tied.
            tops: The modules that are trained in full.
            taken: Paths of the layers to which adapters give low-rank updates.
        """
        for path, own in followers(ties, tops).items():
            fault = train_fault(self._modules[path])
            if not path:
                fault = "no file has a name for what is the model's own"
            elif path in taken:
                fault = "it has a low-rank update from another adapter"
            if fault:
                where = path or "the model itself"
                yield f"{where} is tied with {own}, and cannot follow it: {fault}"


def groups(ties: Ties) -> list[list[Place]]:
    """Return the places of each tied tensor, that of its copy first."""
    found: dict[Place, list[Place]] = {}
    for place, first in ties.items():
        found.setdefault(first, [first]).append(place)
    return list(found.values())


def followers(ties: Ties, tops: Collection[str]) -> dict[str, str]:
    """Return the path of each module that is tied with a trained one, to that one's."""
    found = {}
    for places in groups(ties):
        own = next(path for path, _ in places if inside(path, tops))
        found |= {path: own for path, _ in places if not inside(path, tops)}
    return found


def notes(ties: Ties, tops: Collection[str]) -> Iterator[str]:
    """Yield a line for each trained tensor that other modules have as well."""
    for places in groups(ties):
        above = [next((top for top in tops if inside(path, (top,))), path) for path, _ in places]
        if len({*above}) > 1:  # what is tied inside of one trained module is nobody's surprise
            own = next(place for place in places if inside(place[0], tops))
            plain = all(role == "weight" for _, role in places)
            names = {place: place[0] if plain else full_name(place) for place in places}
            rest = ", ".join(name for place, name in names.items() if place != own)
            yield f"{names[own]} is tied with {rest}: one tensor, which trains in all of them"


def full_name(place: Place) -> str:
    """Return the name of a tensor in the model."""
    return ".".join(filter(None, place))
