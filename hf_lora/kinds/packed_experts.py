"""Experts whose stacks are in 4 bits, frozen: a class in front of their own, as patches are."""

import copyreg
import functools
import inspect
from typing import Any

import torch
from torch import nn

from hf_lora.compat.experts import declared
from hf_lora.errors import StateError
from hf_lora.functional.packed import PackedStack
from hf_lora.kinds.stacked import run


class _Made(type):
    """The class of those that are made at run time: they are pickled by what they are made of."""

    packed_host: type[nn.Module]


class PackedExperts(nn.Module):
    """Mixin that computes a layer of experts from packed stacks, unpacking those with rows only."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what the layer gave before it was packed, as far as 4 bits say it."""
        said = declared(self)
        assert said is not None
        for part in (said.up, said.down):
            if not isinstance(getattr(self, part), PackedStack):
                raise StateError(
                    f"The packed {part} of this {type(self).__name__} was replaced by a "
                    f"{type(getattr(self, part)).__name__}: it cannot be offloaded, nor spread "
                    "over processes. Load the model without that."
                )
        if kwargs:
            own = inspect.signature(super().forward)
            args = tuple(own.bind(*args, **kwargs).arguments.values())
        return run(self, said, args, {})


@functools.cache
def packed_class(host: type[nn.Module]) -> type[nn.Module]:
    """Return the one class that puts :class:`PackedExperts` in front of ``host``."""
    fields = {"__module__": __name__, "__doc__": host.__doc__, "packed_host": host}
    return _Made(f"Packed{host.__name__}", (PackedExperts, host), fields)


copyreg.pickle(_Made, lambda cls: (packed_class, (cls.packed_host,)))  # type: ignore[arg-type]


def is_packed(module: nn.Module) -> bool:
    """Say whether a module is a layer of packed experts, adapted or not."""
    return isinstance(module, PackedExperts)
