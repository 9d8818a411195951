"""Adapters added to a model that is spread already: the same values and gradients everywhere.

FSDP2 shards what a model has when ``fully_shard`` is called, and reduces the gradients of that. An
adapter that comes later is whole on every process. It is small, so it stays so: to shard it by
itself would cost a collective for each layer in each forward.

Where tensor parallelism has split a layer, one of its factors is split alike
(``layers.tensor_parallel``), and the gradient of the other is a sum over the processes.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_lora.compat.dtensor import is_sharded
from hf_lora.compat.torch_execution import after_backward, backward_number
from hf_lora.compat.transformers import averages_itself
from hf_lora.layers.tensor_parallel import split_of
from hf_lora.model.registry import Registry


@torch.no_grad()
def spread(model: nn.Module, registry: Registry, name: str, *, drawn: bool) -> None:
    """Give an adapter the first process's values, and from now on equal gradients, everywhere.

    Every process takes part.

    Args:
        model: A model with sharded parameters.
        registry: Its registry.
        name: An adapter that was added to it, whole on every process.
        drawn: Whether it has values yet; if not, it will be filled alike on each process.
    """
    mesh = _widest_mesh(model)
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)] if mesh else [dist.group.WORLD]
    for _, parameter in registry.parameters(name) if drawn else ():
        for group in groups:
            dist.broadcast(parameter.data, group=group, group_src=0)
    if mesh is None:  # spread without DTensors, by an engine that takes care of gradients itself
        return
    registry.mesh = next((s.mesh for s in map(split_of, model.modules()) if s), None)
    if registry.mesh is not None:
        _split(registry, name)
    whole = [p for _, p in registry.parameters(name) if not _is_split(p)]
    split = [p for _, p in registry.parameters(name) if _is_split(p)]
    _Average.of(whole, groups)
    _Average.of(split, [g for dim, g in enumerate(groups) if not _is_over(mesh, dim, registry)])


def _widest_mesh(model: nn.Module) -> Any:
    meshes = [p.device_mesh for p in model.parameters() if is_sharded(p)]  # type: ignore[attr-defined]
    return max(meshes, key=lambda mesh: mesh.ndim, default=None)


def _is_over(mesh: Any, dim: int, registry: Registry) -> bool:
    """Say whether a dimension of the mesh is that of tensor parallelism."""
    names = mesh.mesh_dim_names or ()
    return registry.mesh is not None and names[dim : dim + 1] == registry.mesh.mesh_dim_names


def _split(registry: Registry, name: str) -> None:
    """Make an adapter's factors DTensors, and its copies too, each process with its part."""
    size = registry.mesh.size()
    for path in registry.adapter(name).places:
        for parameter in registry.modules[path].lora_split(name, registry.mesh):
            # each process has a part of a sum, and the mean is what will be taken
            parameter.register_hook(lambda gradient: gradient * size)
    registry.retie(name)


def _is_split(parameter: Any) -> bool:
    return is_sharded(parameter) and any(p.is_shard() for p in parameter.placements)


@dataclasses.dataclass
class _Average:
    """Hook on parameters that takes the mean of their gradients, all at once, after a backward.

    A mean of means that were taken during accumulation is the same mean.
    """

    parameters: list[nn.Parameter]
    groups: list[Any]
    backward: int = -1

    @classmethod
    def of(cls, parameters: list[nn.Parameter], groups: list[Any]) -> None:
        """Take the mean of these parameters' gradients over these groups from now on."""
        average = cls(parameters, groups)
        for parameter in parameters if groups else ():
            parameter.register_post_accumulate_grad_hook(average)

    def __call__(self, _: torch.Tensor) -> None:
        now = backward_number()
        if now != self.backward:
            self.backward = now
            after_backward(self.run)

    @torch.no_grad()
    def run(self) -> None:
        """Take the mean over the processes; a gradient that one of them lacks counts as zero."""
        ours = [p for p in self.parameters if p.requires_grad and not averages_itself(p)]
        for dtype in dict.fromkeys(p.dtype for p in ours):
            self._take_mean([p for p in ours if p.dtype == dtype])

    def _take_mean(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [_own(parameter.grad) for parameter in parameters]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        for group in self.groups:
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


def _own(gradient: Any) -> torch.Tensor:
    return gradient.to_local() if is_sharded(gradient) else gradient
