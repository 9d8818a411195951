"""The words of the texts that LoRA is taught with (``layer.r``, ``layer.base``), as attributes.

A layer keeps its host's attributes, and a host may have one of the same name; its own forward may
need it, so the host's is the one that is meant wherever there is one.
"""

from collections.abc import Callable
from typing import Any

from torch import nn


class HostFirst:
    """A read-only attribute that steps back where the host has one of the same name."""

    def __init__(self, read: Callable[[Any], Any]):
        self.read = read
        self.__doc__ = read.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner = owner
        self.name = name

    def __get__(self, layer: nn.Module | None, owner: type) -> Any:
        """Return the host's attribute, or else the adapter's."""
        if layer is None:
            return self
        for held in (layer.__dict__, layer._parameters, layer._buffers, layer._modules):
            if self.name in held:
                return held[self.name]
        try:
            return getattr(super(self.owner, layer), self.name)  # what the host's class defines
        except AttributeError:
            return self.read(layer)

    def __set__(self, layer: nn.Module, value: Any) -> None:
        """Set the host's attribute; the adapter's numbers follow from its configuration."""
        self._check(layer)
        layer.__dict__[self.name] = value

    def __delete__(self, layer: nn.Module) -> None:
        """Delete the host's attribute."""
        self._check(layer)
        del layer.__dict__[self.name]

    def _check(self, layer: nn.Module) -> None:
        if self.name not in layer.__dict__:
            raise AttributeError(
                f"{self.name!r} follows from the adapter's configuration and cannot be changed; "
                "add an adapter with other numbers instead"
            )
