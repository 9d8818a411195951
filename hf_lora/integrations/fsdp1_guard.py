"""Keeping PyTorch's first FSDP from flattening models that carry adapters, which it cannot hold.

``FullyShardedDataParallel`` puts the parameters of a block into one flat tensor, and takes them off
their modules. An adapter can then neither be found nor saved, and of a module that is trained in
full there is nothing to take off. Its successor ``fully_shard`` leaves each parameter where it is.
"""

import functools
from typing import Any

from torch import nn

from hf_lora.compat.fsdp1 import FSDP1
from hf_lora.errors import StateError
from hf_lora.integrations.import_hooks import when_imported
from hf_lora.layers.kind import Patched

_MARK = "_hf_lora_guard"


def install() -> None:
    """Guard the wrapper's constructor, now if it is imported, and otherwise when it will be."""
    when_imported("torch.distributed.fsdp.fully_sharded_data_parallel", _guard)


def _guard(module: Any) -> None:
    owner = getattr(module, "FullyShardedDataParallel", None)
    construct = getattr(owner, "__init__", None)
    if owner is None or construct is None or hasattr(construct, _MARK):
        return

    @functools.wraps(construct)
    def __init__(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(each, Patched) for each in module.modules()):
            raise StateError(f"This {type(module).__name__} carries adapters of hf_lora. {FSDP1}")
        construct(self, module, *args, **kwargs)

    setattr(__init__, _MARK, True)
    owner.__init__ = __init__
