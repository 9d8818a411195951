"""What the base's checkpoint did not fill: a fresh head trains, and whatever else is fresh is told.

Such parts hold random numbers. An adapter that is saved without them means nothing, because the
next load draws others.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.compat.accelerate import is_offloaded
from hf_lora.compat.dtensor import is_distributed, is_sharded
from hf_lora.compat.transformers import (
    is_backbone,
    is_filled,
    is_initialized,
    is_of_its_checkpoint,
    is_pretrained,
    loads_on_first_only,
    was_loaded,
)
from hf_lora.layers.probe import host_class
from hf_lora.layers.trained import own_parameters
from hf_lora.targets import inside, parents

_NOT_NEEDED = "a {} is no task's model, and the outputs that are wanted may not need it"
_OUTSIDE = "it is no part of transformers' model, and may have been loaded by other code"
_PARTLY = "the rest of {} was in the checkpoint; train=[...] can only take all of it"
_UNKNOWN = (
    "a copy of a model, or one that is offloaded, has lost transformers' marks of what was in the "
    "checkpoint, which is that of another class"
)


@dataclasses.dataclass(frozen=True)
class Unfilled:
    """The parts of a model that its checkpoint did not fill, as far as that is known."""

    needed: tuple[str, ...] = ()
    """Paths of modules that the outputs of a task's model depend on, all of them fresh."""

    other: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Path of any other module or parameter, to why it does not train without being named."""


def find_unfilled(model: nn.Module, head: Iterable[str] = ()) -> Unfilled:
    """Find out what the checkpoint of a model lacks.

    A model that no checkpoint was loaded into has nothing of the kind, nor have embeddings and
    output heads that were resized, or layers that another library has put in.

    Args:
        model: Any model, also a wrapped one.
        head: Paths of its output head, for a copy of a model, which does not say what is fresh.
    """
    found = _Search(model).run(head)
    if not loads_on_first_only():
        return found
    sent: list[Unfilled] = [found]
    dist.broadcast_object_list(sent, src=0)
    return sent[0]


class _Search:
    """One look at a model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = dict(model.named_modules())
        self.parameters = {
            (path, name): parameter
            for path, module in self.modules.items()
            for name, parameter in own_parameters(module)
        }
        self.models = [path for path, module in self.modules.items() if is_pretrained(module)]

    def run(self, head: Iterable[str]) -> Unfilled:
        if not any(map(is_filled, self.parameters.values())):
            return Unfilled(other=dict(self._unknown(head)))
        fresh = {place for place, p in self.parameters.items() if self._is_fresh(*place, p)}
        parts = _topmost(self._whole(fresh))
        needed, other = [], {}
        for path in parts:
            reason = self._why_not_needed(path)
            if reason is None:
                needed.append(path)
            else:
                other[path] = reason
        for path, name in sorted(fresh):
            if not inside(path, parts) and not _is_constant(self.parameters[path, name]):
                full = f"{path}.{name}" if path else name
                other[full] = _PARTLY.format(path or "the model")
        hidden = [m for m in self.modules.values() if is_offloaded(m)]
        return Unfilled(tuple(needed), other | dict(self._unknown(head) if hidden else ()))

    def _is_fresh(self, path: str, name: str, parameter: nn.Parameter) -> bool:
        module = self.modules[path]
        if is_filled(parameter) or is_offloaded(module):
            return False
        if is_lazy(parameter) or not _is_ordinary(parameter):
            return False  # a quantizer has put it there
        around = self._nearest_model(path)
        if around is None:
            return True
        if is_initialized(self.modules[around]) and not is_initialized(module):
            return False
        return not self._is_resized(module, self.modules[around])

    def _is_resized(self, module: nn.Module, model: nn.Module) -> bool:
        """Say whether a module is the output head of a model whose vocabulary was resized.

        ``resize_token_embeddings`` makes a new head, and keeps the Parameter of the embeddings.
        """
        if module is not _embedding(model, "get_output_embeddings"):
            return False
        there = [p for _, p in own_parameters(_embedding(model, "get_input_embeddings") or module)]
        return any(map(is_filled, there)) and is_of_its_checkpoint(model, host_class(model))

    def _whole(self, fresh: set[tuple[str, str]]) -> Iterator[str]:
        """Yield the modules that have parameters, own or below, all of them fresh."""
        filled = {path for path, name in self.parameters if (path, name) not in fresh}
        above = {parent for path in filled for parent in (path, *parents(path))}
        some = {parent for path, _ in fresh for parent in (path, *parents(path))}
        yield from (path for path in self.modules if path and path in some - above)

    def _why_not_needed(self, path: str) -> str | None:
        """Return why the part at ``path`` may be left as it is, or None."""
        outer = [each for each in self.models if not each or inside(path, [each])]
        if not outer:
            return _OUTSIDE
        cls = host_class(self.modules[outer[0]])
        return _NOT_NEEDED.format(cls.__name__) if is_backbone(cls) else None

    def _unknown(self, head: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Yield the head of a model that was loaded, of which it is not known what was filled."""
        if not self.models or self.models[0]:
            return
        model = self.model
        if was_loaded(model) and not is_of_its_checkpoint(model, host_class(model)):
            output = _embedding(model, "get_output_embeddings")
            mine = [path for path in head if next(own_parameters(self.modules[path]), None)]
            for path in mine:
                if self.modules[path] is not output:
                    yield path, _UNKNOWN

    def _nearest_model(self, path: str) -> str | None:
        above = (path, *parents(path), "")
        return next((each for each in above if each in self.models), None)


def _embedding(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # transformers' word for: this model has none
        return None
    return found if isinstance(found, nn.Module) else None


def _topmost(paths: Iterable[str]) -> list[str]:
    found: list[str] = []
    for path in paths:  # in the model's order, parents first
        if not inside(path, found):
            found.append(path)
    return found


def _is_ordinary(parameter: nn.Parameter) -> bool:
    plain = type(parameter) is nn.Parameter or is_sharded(parameter)
    return plain and parameter.is_floating_point() and parameter.dtype.itemsize > 1


def _is_constant(parameter: nn.Parameter) -> bool:
    """Say whether a parameter holds one number only: what it starts at, each time it is made."""
    if parameter.is_meta or is_distributed(parameter):
        return False
    return bool((parameter == parameter.flatten()[:1]).all())
