"""Adapters added to a model that is sharded already: the same values and gradients everywhere.

FSDP2 shards what a model has when ``fully_shard`` is called, and reduces the gradients of that. An
adapter that comes later is whole on every process. It is small, so it stays so: to shard it by
itself would cost a collective for each layer in each forward.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Variable

from hf_lora.sharding import is_sharded

_SAME_BATCH = ("tp",)
"""Dimensions of a mesh along which all processes see the same rows, so there is no mean to take."""


@torch.no_grad()
def keep_equal(model: nn.Module, parameters: list[nn.Parameter], *, drawn: bool) -> None:
    """Give the parameters the first process's values, and from now on the mean of all gradients.

    Every process takes part.

    Args:
        model: A model with sharded parameters.
        parameters: What was added to it.
        drawn: Whether they have values yet; if not, they will be filled alike on each process.
    """
    mesh: Any = next(p for p in model.parameters() if is_sharded(p)).device_mesh  # type: ignore[attr-defined]
    names = mesh.mesh_dim_names or (None,) * mesh.ndim
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
    plain = [parameter for parameter in parameters if not is_sharded(parameter)]
    for parameter in plain if drawn else ():
        for group in groups:
            dist.broadcast(parameter.data, group=group, group_src=0)
    means = [group for group, name in zip(groups, names, strict=True) if name not in _SAME_BATCH]
    average = _Average(plain, means)
    for parameter in plain:
        parameter.register_post_accumulate_grad_hook(average)


class _Average:
    """Hook on parameters that takes the mean of their gradients, all at once, after a backward.

    A mean of means that were taken during accumulation is the same mean.
    """

    def __init__(self, parameters: list[nn.Parameter], groups: list[Any]):
        self.parameters = parameters
        self.groups = groups
        self.backward = -1

    def __call__(self, _: torch.Tensor) -> None:
        now = torch._C._current_graph_task_id()
        if now != self.backward:
            self.backward = now
            Variable._execution_engine.queue_callback(self.run)  # type: ignore[attr-defined]

    @torch.no_grad()
    def run(self) -> None:
        """Take the mean over the processes; a gradient that one of them lacks counts as zero."""
        # Trainer averages those of a model that from_pretrained sharded by itself, and marks them
        ours = [
            p
            for p in self.parameters
            if p.requires_grad and not hasattr(p, "_replicated_grad_hook_registered")
        ]
        for dtype in dict.fromkeys(p.dtype for p in ours):
            self._take_mean([p for p in ours if p.dtype == dtype])

    def _take_mean(self, parameters: list[nn.Parameter]) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        for group in self.groups:
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)
        means = flat.split([grad.numel() for grad in grads])
        for parameter, grad, mean in zip(parameters, grads, means, strict=True):
            parameter.grad = grad.copy_(mean.view_as(grad))
