"""What the nodes of autograd's graph keep, and who else decides it. Seen in PyTorch 2.13.

Each name here is of C++ and stands in no documentation. One that is missing raises AttributeError,
in a test of that name; one that means something else is found by the caller, who compares what it
has computed again with what there was, once for each place of a model.
"""

from collections.abc import Callable
from typing import Any, cast

import torch

Hook = Callable[[Any], Any]


def saved_factors(node: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return both factors that a product's node has saved; None for one that nothing needs.

    Raises:
        RuntimeError: They are freed, or were changed in place since.
    """
    return node._saved_self, node._saved_other


def saved_input(node: Any) -> torch.Tensor:
    """Return what the node of an activation function has saved.

    Raises:
        RuntimeError: It is freed, or was changed in place since.
    """
    return node._saved_self


def gelu_approximation(node: Any) -> str:
    """Return by which formula the node of a GELU has computed: ``"none"`` or ``"tanh"``."""
    return node._saved_approximate


def result_of(node: Any) -> Any:
    """Return an object with the ``shape`` and ``dtype`` of what a node's operation gave."""
    return node._input_metadata[0]


def hooks_on_saved() -> tuple[Hook, Hook] | None:
    """Return the innermost pair (pack, unpack) of ``saved_tensors_hooks`` that is in force.

    Without it a tensor would be rebuilt from what activation checkpointing has thrown away.
    """
    top = torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]
    return cast(tuple[Hook, Hook] | None, top)
