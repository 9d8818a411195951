"""Which casts of a model's layers an adapter follows: those of the whole model, and no others.

Layers are cast alone for storage (float8 at rest, brought up for each call), for a head in float32,
and by whoever keeps parts of a model in several types. What trains there keeps its own precision.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_lora.layers.names import REGISTRY

if TYPE_CHECKING:
    from hf_lora.layers.kind import Patched

Function = Callable[[torch.Tensor], torch.Tensor]


def sparing(module: "Patched", fn: Function) -> Function:
    """Return ``fn``, which is about to be applied to all of a module's tensors, as ours take it.

    They move with the module. They are cast only with the whole model, and never to 8 bits.
    """
    held = [*module._parameters.items(), *module._buffers.items()]
    added = module.lora_added()
    tensors = [tensor for name, tensor in held if name in added and tensor is not None]
    tensors += [tensor.grad for tensor in tensors if tensor.grad is not None]
    ours = {id(tensor): tensor for tensor in tensors}
    follows = not module.lora_routing.owned or _is_whole_cast()

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        new = fn(tensor)
        if new.dtype == tensor.dtype or id(tensor) not in ours:
            return new
        return new if follows and new.dtype.itemsize > 1 else tensor.to(new.device)

    return apply


def _is_whole_cast() -> bool:
    """Say whether the cast under way began at a wrapped model, or above one."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_apply":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and REGISTRY in vars(module):
                return True
        frame = frame.f_back
    return False
