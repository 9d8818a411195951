"""An optimizer's state as one process would have it, of parameters that several processes share."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hf_lora.compat.dtensor import distribute_like, full_tensor, is_sharded


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's ``state_dict`` with whole tensors; every process takes part."""
    entries = {
        index: {key: _whole(value) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


@contextlib.contextmanager
def whole_states(*optimizers: Any) -> Iterator[None]:
    """Make optimizers give and take whole tensors inside the ``with`` block.

    Args:
        *optimizers: torch's own, or accelerate's around them. While the block lasts, every process
            must take part when one asks for a state.
    """
    with contextlib.ExitStack() as stack:
        for optimizer in optimizers:
            inner = getattr(optimizer, "optimizer", optimizer)
            stack.callback(inner.register_state_dict_post_hook(_gather).remove)
            stack.callback(inner.register_load_state_dict_pre_hook(_spread).remove)
        yield


def _gather(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return gathered(state)


def _spread(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Spread a state of whole tensors in the way that the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        index: {key: _as(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _whole(value: Any) -> Any:
    return full_tensor(value) if isinstance(value, torch.Tensor) else value


def _as(value: Any, parameter: torch.Tensor) -> Any:
    same = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    return distribute_like(value, parameter) if same and not is_sharded(value) else value
