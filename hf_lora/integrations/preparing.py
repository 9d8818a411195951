"""What accelerate finds out of a model before it shards it: asked of the base, and not of a copy.

FSDP2 takes a shared parameter only if all that share it are sharded together, so accelerate looks
whether the embeddings' weight is the head's. Of a base in 16 bits an adapter's copy, in 32, is cast
whenever it is read, and no two reads are the same tensor.
"""

import contextlib
from typing import Any

from torch import nn

from hf_lora.adapter_io.owner import owner
from hf_lora.integrations.import_hooks import when_imported
from hf_lora.integrations.in_front import Original, patch_class

_MODULE, _CLASS, _METHOD = "accelerate.accelerator", "Accelerator", "prepare"


def install() -> None:
    """Patch accelerate now if it is imported, and otherwise when it will be."""
    when_imported(_MODULE, _patch)


def _patch(module: Any) -> None:
    words = "tied weights that an adapter trains may be sharded apart"
    patch_class(module, _CLASS, {_METHOD: _prepare}, words)


def _prepare(original: Original, accelerator: Any, *args: Any, **kwargs: Any) -> Any:
    """Prepare whatever is given, while the modules of our models read as the base's."""
    models = [each for each in args if isinstance(each, nn.Module)]
    with contextlib.ExitStack() as stack:
        for _, registry in filter(None, map(owner, models)):
            stack.enter_context(registry.routing.base_read())
        return original(*args, **kwargs)
