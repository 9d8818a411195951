"""PyTorch's first FSDP, ``FullyShardedDataParallel``: how it is known, and why it is refused."""

from torch import nn

from hf_lora.errors import StateError

FSDP1 = (
    "PyTorch's FullyShardedDataParallel (FSDP1) keeps the parameters of a block in one flat "
    "tensor, in which adapters can be neither found nor saved. Shard with FSDP2 instead: after "
    "hf_lora.wrap call torch.distributed.fsdp.fully_shard on each block and on the model (with "
    "accelerate: fsdp_version=2)."
)
"""Why it is refused, and what does its work."""

_CHILD = "_fsdp_wrapped_module"


def check_no_fsdp1(model: nn.Module) -> None:
    """Raise StateError if it is around a model, or around a part of one."""
    if any(_CHILD in module._modules for module in model.modules()):
        raise StateError(f"This {type(model).__name__} is sharded already. {FSDP1}")
