"""The forwards of tensor parallelism: transformers keeps in a closure what hf_lora reads there."""

import types

import pytest
import torch.distributed as dist
from torch import nn
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ReplicatedWithGradAllReduce,
)

from hf_lora.compat import tensor_parallel as compat

MESH = object()


def split(style: str) -> nn.Linear:
    """A layer with the forward of a style, which is looked at and not run."""
    module = nn.Linear(2, 2)
    ALL_PARALLEL_STYLES[style].install_forward(module, MESH)
    return module


@pytest.mark.parametrize(("style", "kind"), [("colwise", compat.COLUMNS), ("rowwise", compat.ROWS)])
def test_the_closure_of_tp_forward_has_self_mesh_module_and_original_forward(style: str, kind: str):
    module = split(style)
    found = compat.parallel_forward(module)
    assert found == compat.ParallelForward(style, kind, MESH)
    assert compat.called_by(module.forward).__func__ is nn.Linear.forward


def test_another_forward_is_put_inside_and_the_style_stays_around_it():
    module = split("colwise")
    other = nn.Linear(2, 2)
    ours = types.MethodType(lambda self, x: x, other)
    forward = compat.calling(module.forward, other, ours)
    assert compat.called_by(forward) is ours
    other.forward = forward
    assert compat.parallel_forward(other) == compat.parallel_forward(module)


def test_a_forward_that_is_not_of_tensor_parallelism_is_its_own():
    module = nn.Linear(2, 2)
    assert compat.parallel_forward(module) is None
    assert compat.called_by(module.forward) == module.forward
    method = types.MethodType(lambda self, x: x, module)
    assert compat.calling(module.forward, module, method) is method


def test_a_style_whose_closure_has_other_names_is_seen_and_not_followed():
    module = nn.Linear(2, 2)
    ReplicatedWithGradAllReduce().install_forward(module, MESH)
    found = compat.parallel_forward(module)
    assert found is not None
    assert found.kind not in (compat.COLUMNS, compat.ROWS)
    assert compat.called_by(module.forward) is module.forward


def test_distribute_module_applied_is_pytorchs_mark():
    from torch.distributed.tensor import DeviceMesh, distribute_module

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = nn.Linear(2, 2)
        assert not compat.split_by_torch(module)
        distribute_module(module, DeviceMesh("cpu", [0]))
        assert compat.split_by_torch(module)
    finally:
        dist.destroy_process_group()
