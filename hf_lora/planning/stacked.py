"""Weights of experts that are stacked in one parameter, which no update reaches, and their names.

Before transformers stacked them each expert had layers of its own, and people still name those.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.compat.deepspeed import shape_of
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.trained import tensor_names
from hf_lora.targets import compile_target

_FORMER = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "down_proj": ("down_proj", "w2"),
}


@dataclasses.dataclass(frozen=True)
class Stack:
    """A parameter that holds a matrix for each of several experts."""

    path: str
    """Of the module that has it."""

    name: str
    tensor: torch.Tensor = dataclasses.field(compare=False, repr=False)

    @property
    def full_name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.name}" if self.path else self.name

    def layers(self) -> Iterator[str]:
        """Yield the paths that the layers of the first expert had before they were stacked."""
        for name in _FORMER.get(self.name, (self.name,)):
            yield f"{self.path}.0.{name}"


def stacks(modules: Mapping[str, nn.Module]) -> Iterator[Stack]:
    """Yield the stacked parameters of a model, in order."""
    for path, module in modules.items():
        # a parametrized weight (weight_norm) stands in a module of its own below the layer
        owner = modules[path.partition(".parametrizations.")[0]]
        if isinstance(owner, nn.modules.conv._ConvNd):
            continue
        for name in tensor_names(module):
            tensor = parameter_of(module, name)
            if tensor is None or is_lazy(tensor):
                continue
            shape = shape_of(tensor)
            if len(shape) == 3 and shape[0] > 1:
                yield Stack(path, name, tensor)


def meant_stacks(found: Iterable[Stack], patterns: Iterable[str]) -> list[Stack]:
    """Return those that one of the patterns means, by the names that their layers had."""
    compiled = [compile_target(text) for text in patterns]
    return [
        stack
        for stack in found
        if any(pattern.fullmatch(name) for name in stack.layers() for pattern in compiled)
    ]
