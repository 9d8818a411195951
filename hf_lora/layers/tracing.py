"""Which linear layers of a model are called with the same tensor, seen in one traced forward.

A model's q, k and v projections are called one after the other with the very same tensor. That is
found out by looking: a copy of the module tree, which shares all weights and buffers and has no
hooks, runs on one row of the first batch of a training, without gradients. It ends before it writes
anything that it shares, and it does not begin where no two layers could read one tensor. No
architecture is listed. The result
depends on the model alone, so that a training which is resumed computes as the one that was not
interrupted.
"""

import collections
import copy
import itertools
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_lora.compat.accelerate import is_placed
from hf_lora.compat.deepspeed import is_partitioned
from hf_lora.compat.torch_modules import HOOKS, storage_of

Groups = list[list[nn.Module]]


def same_input_groups(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Groups:
    """Return the linear layers that read one tensor, in the order of their calls.

    Args:
        model: The model; nothing of it changes.
        args: What its forward was called with.
        kwargs: What its forward was called with.

    Returns:
        Groups of two layers or more. None at all where the model cannot be traced so: its layers
        are placed or sharded by somebody else, or its forward fails on the copy.
    """
    if any(_is_placed(module) for module in model.modules()):
        return []
    for rows in (_one_row, lambda value, batch: value):
        try:
            return _trace(model, *_map((args, kwargs), rows))
        except _WouldWrite:
            return []
        except Exception:  # the model's own forward, which may want what it was not given
            continue
    return []


def may_share(model: nn.Module) -> bool:
    """Say whether two patched layers of the model could be called with the same tensor.

    They take as many features, and belong to one module or to neighbours in it; a sequence hands
    each of its modules what the one before it gave.
    """
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            continue
        inside = itertools.chain.from_iterable(
            [child] if _is_patched(child) else filter(_is_patched, child.children())
            for child in module.children()
            if _is_patched(child) or not isinstance(child, nn.Sequential)
        )
        widths = [layer.lora_features()[0] for layer in inside]  # type: ignore[operator]
        if len(set(widths)) < len(widths):
            return True
    return False


def _is_patched(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and "lora_slots" in vars(module)


class _WouldWrite(RuntimeError):
    """The traced forward wants to write a tensor that is not its own."""


class _Reading(TorchDispatchMode):
    """Lets no operation write tensors that are shared with the model or with its caller."""

    def __init__(self, shared: set[int]):
        super().__init__()
        self._shared = shared

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            declared = func._schema.arguments
            given = [*zip(declared, args, strict=False)]
            given += [(one, kwargs[one.name]) for one in declared if one.name in kwargs]
            for one, value in given:
                if one.alias_info is not None and one.alias_info.is_write and self._has(value):
                    raise _WouldWrite(str(func))
        return func(*args, **kwargs)

    def _has(self, value: Any) -> bool:
        tensors = value if isinstance(value, (list, tuple)) else [value]
        return any(isinstance(t, torch.Tensor) and storage_of(t) in self._shared for t in tensors)


def _is_placed(module: nn.Module) -> bool:
    return is_placed(module) or any(
        type(tensor) is not nn.Parameter or is_partitioned(tensor)
        for tensor in module._parameters.values()
        if tensor is not None
    )


@torch.no_grad()
def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Groups:
    twin = _twin(model)
    originals = dict(model.named_modules())
    shared = {storage_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    _map((args, kwargs), lambda tensor, _: shared.add(storage_of(tensor)))
    groups: list[list[nn.Module]] = []
    seen: set[nn.Module] = set()
    last: list[Any] = [None]

    def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], path: str) -> None:
        x = inputs[0] if inputs else next(iter(named.values()), None)
        same, last[0] = x is last[0], x
        layer = originals[path]
        if layer in seen:  # a shared layer is called many times; its first call counts
            last[0] = None
        elif same:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        seen.add(layer)

    notes = [
        module.register_forward_pre_hook(
            lambda module, inputs, named, path=path: note(module, inputs, named, path),
            with_kwargs=True,
        )
        for path, module in twin.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    # also where dropout is off, a model may draw random numbers
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cpu"
    indices = [device.index or 0 for device in devices] if kind != "cpu" else []
    try:
        fork = torch.random.fork_rng(indices, device_type=kind if indices else "cuda")
        with fork, _Reading(shared):
            twin.eval()(*args, **kwargs)
    finally:
        for each in notes:  # a twin that holds itself would hold the model through them
            each.remove()
    return [group for group in groups if len(group) > 1]


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree on the same parameters and buffers."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        memo |= {id(vars(module)[name]): collections.OrderedDict() for name in HOOKS}
    return copy.deepcopy(model, memo)


def _map(value: Any, change: Any, batch: list[int] | None = None) -> Any:
    """Change every tensor in nested tuples, lists and dicts."""
    batch = [] if batch is None else batch
    if isinstance(value, torch.Tensor):
        return change(value.detach(), batch)
    if type(value) in (tuple, list):
        return type(value)(_map(item, change, batch) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, change, batch) for key, item in value.items()}
    return copy.deepcopy(value)  # such as a cache, which the forward would fill


def _one_row(tensor: torch.Tensor, batch: list[int]) -> torch.Tensor:
    """Return the first row of what has as many rows as the first tensor had."""
    if tensor.dim() and not batch:
        batch.append(tensor.shape[0])
    return tensor[:1] if tensor.dim() and tensor.shape[0] == batch[0] else tensor
