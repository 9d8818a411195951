"""Layers that transformers has split by tensor parallelism, and how their factors are split.

transformers puts a forward of its own on each such module. It prepares the input, calls the forward
that it found, and joins what the processes have computed. A patched layer stays inside of it and
computes with its own process's part, as the base does:

- A column-parallel layer holds some rows of W (out, in) and sees all of x. A is whole everywhere,
  B (out, r) is split like W. Each process has a part of A's gradient; the sum of all is A's.
- A row-parallel layer holds some columns of W and sees those columns of x. A (r, in) is split like
  W, B is whole. The update is added to the part of the output that is summed up afterwards anyway;
  each process has a part of B's gradient.

So an adapter costs one sum over all its whole factors' gradients after a backward (see
``model.replicas``), and nothing in a forward.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_lora.compat.dtensor import is_sharded
from hf_lora.compat.tensor_parallel import COLUMNS, ROWS, parallel_forward, split_by_torch
from hf_lora.compat.transformers import COMPUTES_LOCALLY
from hf_lora.functional.dropout import keep_mask, unpacked
from hf_lora.layers.kind import Patched
from hf_lora.layers.names import LORA_A, LORA_B, parameter_name

SPLIT_WITH = {COLUMNS: {LORA_B: 0}, ROWS: {LORA_A: 1}}
"""transformers' class of a style to the factor that is split with the weight, and along what."""


@dataclasses.dataclass(frozen=True)
class Split:
    """How tensor parallelism has split a layer."""

    style: str
    """transformers' word for it, such as ``"colwise"``."""

    dims: dict[str, int]
    """``lora_A`` or ``lora_B``, whichever is split with the weight, to the dimension."""

    mesh: Any
    """The processes among which it is."""

    @property
    def by_rows(self) -> bool:
        """Whether each process sees some columns of x, and computes a part of a sum."""
        return LORA_A in self.dims


def split_of(module: nn.Module) -> Split | None:
    """Return how a module was split, if in a way that an adapter can follow."""
    found = parallel_forward(module)
    dims = SPLIT_WITH.get(found.kind or "") if found else None
    return Split(found.style, dims, found.mesh) if found and dims else None


def split_fault(module: nn.Module) -> str | None:
    """Return why a layer that tensor parallelism has taken hold of cannot be adapted, or None."""
    if split_by_torch(module):
        return (
            "PyTorch's parallelize_module has split it, which adapters cannot follow; load the "
            "model with from_pretrained(..., distributed_config=DistributedConfig(tp_size=...))"
        )
    found = parallel_forward(module)
    if found is None:
        return None
    style = found.style
    if split_of(module) is None:
        return (
            f"tensor parallelism has split it in the style {style!r}, which adapters cannot "
            "follow (they can follow styles of the kinds colwise and rowwise); exclude it, or give "
            "it another style in tp_plan"
        )
    weight = module._parameters.get("weight")
    if hasattr(module, COMPUTES_LOCALLY) and not isinstance(module, Patched):
        return f"tensor parallelism has split it ({style!r}) and it is quantized; exclude it"
    if not is_sharded(weight) or not weight.is_floating_point():  # type: ignore[union-attr]
        return f"tensor parallelism ({style!r}) has not split its weight in the usual way"
    return None


def split_factors(layer: nn.Module, adapter: str, split: Split | None, mesh: Any) -> None:
    """Make the whole factors of a layer DTensors: split like its weight, or a copy everywhere.

    All processes have the same numbers, and nothing is sent. What is not split is a DTensor as
    well, because torch clips and updates no mixture of DTensors and plain tensors.
    """
    for kind in (LORA_A, LORA_B):
        name = parameter_name(kind, adapter)
        dim = split.dims.get(kind) if split else None
        layer._parameters[name] = as_distributed(layer._parameters[name], mesh, dim)  # type: ignore[arg-type]


def as_distributed(parameter: nn.Parameter, mesh: Any, dim: int | None = None) -> nn.Parameter:
    """Return a parameter's numbers as a DTensor, split along ``dim`` or copied."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placement = Replicate() if dim is None else Shard(dim)
    data = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    new = nn.Parameter(data, parameter.requires_grad)
    vars(new).update(vars(parameter))
    return new


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, with its gradient."""
    if type(tensor) in (nn.Parameter, torch.Tensor):
        return tensor
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[operator]


def draws_apart(layer: nn.Module, dropouts: Iterable[float]) -> bool:
    """Say whether dropout must know that this process sees some columns of the input only."""
    split = split_of(layer) if any(dropouts) else None
    return split is not None and split.by_rows


def dropped(layer: nn.Module, x: torch.Tensor, p: float) -> torch.Tensor:
    """Return x with a share p of its elements dropped, and the others scaled by 1/(1-p).

    Of a row-parallel layer x is this process's columns; the mask is drawn for all columns. Where
    the processes have equal seeds it is the one that a single process would have drawn.
    """
    split = split_of(layer)
    if split is None or not split.by_rows:
        return F.dropout(x, p)
    size, rank, whole = split.mesh.size(), split.mesh.get_local_rank(), int(layer.in_features)  # type: ignore[arg-type]
    rows = x.numel() // x.shape[-1]
    keep = unpacked(keep_mask(rows, whole, p, x.device), whole)
    each = -(-whole // size)
    own = keep[:, each * rank : each * rank + x.shape[-1]].view_as(x)
    return x * own.to(x.dtype).div_(1 - p)
