"""Modules that are known without being kept alive, as a model is by what is known of it.

The registry is an attribute of the model. What it holds of the model itself would keep both until
the next collection of garbage, with all memory of the model.
"""

import weakref
from typing import Any

from torch import nn


class Weakly:
    """A module that is not kept alive by who holds this; in a copy or a pickle it is that one's."""

    def __init__(self, module: nn.Module):
        self._reference = weakref.ref(module)

    @property
    def module(self) -> nn.Module | None:
        """The module, or None if it is gone."""
        return self._reference()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle with the module itself."""
        return Weakly.__new__, (Weakly,), (self.module,)

    def __setstate__(self, state: tuple[nn.Module | None]) -> None:
        self._reference = _gone if state[0] is None else weakref.ref(state[0])


def _gone() -> None:
    return None
