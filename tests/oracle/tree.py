"""A record of everything that a module tree consists of, to compare before and after."""

import dataclasses
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Tree:
    """What a model is made of, by identity; two equal trees are made of the same objects."""

    modules: dict[str, dict[str, Any]]
    flags: dict[str, bool]
    keys: list[str]
    values: dict[str, torch.Tensor] = dataclasses.field(compare=False)
    """Copies of all values, compared by :meth:`same_values`."""

    held: list[Any] = dataclasses.field(compare=False, repr=False)
    """The objects themselves: an id says nothing about an object that is gone."""

    @classmethod
    def of(cls, model: nn.Module) -> "Tree":
        """Record ``model`` as it is now."""
        held: list[Any] = []
        modules = {path: _module(module, held) for path, module in model.named_modules()}
        state = model.state_dict()
        return cls(
            modules=modules,
            flags={name: p.requires_grad for name, p in model.named_parameters()},
            keys=list(state),
            values={key: value.detach().clone() for key, value in state.items()},
            held=held,
        )

    def same_values(self, model: nn.Module) -> bool:
        """Say whether the model's own tensors have the bytes that they had."""
        now = model.state_dict()
        return all(torch.equal(now[key], value) for key, value in self.values.items())


def _module(module: nn.Module, held: list[Any]) -> dict[str, Any]:
    """Return name to identity of the class, and of every attribute and what its dict holds."""
    record: dict[str, Any] = {"class": id(type(module)), "object": id(module)}
    held.append(module)
    for name, value in module.__dict__.items():
        held.append(value)
        record[f"attribute {name}"] = id(value)
        if isinstance(value, dict):
            held.extend(value.values())
            record[f"content of {name}"] = [(key, id(item)) for key, item in value.items()]
    return record
