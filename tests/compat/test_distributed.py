"""What is private to PyTorch's and DeepSpeed's sharding: there, and meaning what we take it for.

One process each, so that what fails names the part; what several do is in tests/distributed.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_lora.compat import dtensor, fsdp1, libraries
from hf_lora.errors import StateError
from tests.forked import run_code


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_device_mesh_and_placements_tell_a_dtensor(alone: None):
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    plain = torch.arange(6.0).view(3, 2)
    spread = distribute_tensor(plain, DeviceMesh("cpu", [0]), [Shard(0)])
    assert dtensor.is_sharded(spread)
    assert not dtensor.is_sharded(plain)
    assert torch.equal(dtensor.full_tensor(spread), plain)
    again = dtensor.distribute_like(plain + 1, spread)
    assert (again.device_mesh, again.placements) == (spread.device_mesh, spread.placements)
    (found,) = dtensor.gather_values([(spread, range(0, 6, 2))])
    assert found.tolist() == [0.0, 2.0, 4.0]


def test_split_factor_is_what_strided_shards_are_made_with(alone: None):
    """FSDP2 over tensor parallelism: a dimension that is cut twice."""
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    strided = _StridedShard(1, split_factor=2)
    assert not strided.is_shard()
    along = dtensor._along_first(strided)
    assert (type(along), along.dim, along.split_factor) == (_StridedShard, 0, 2)
    assert dtensor._along_first(Shard(1)) == Shard(0)


def test_fsdp_module_has_reshard(alone: None):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 4))
    fully_shard(model[0])
    fully_shard(model)
    model(torch.ones(1, 4))
    model[0].unshard()
    assert not dtensor.has_distributed_parameters(model)
    dtensor.reshard(model)
    assert dtensor.has_distributed_parameters(model)


def test_fsdp_wrapped_module_is_the_child_of_the_first_fsdp(alone: None):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(nn.Linear(4, 4))
    fsdp1.check_no_fsdp1(model)
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    with pytest.raises(StateError, match="fully_shard"):
        fsdp1.check_no_fsdp1(nn.Sequential(sharded))


def test_classes_that_save_themselves_are_where_they_are_looked_for():
    from diffusers.models.modeling_utils import ModelMixin
    from huggingface_hub.hub_mixin import ModelHubMixin

    class Diffusion(ModelMixin):
        pass

    class Hub(nn.Module, ModelHubMixin):
        pass

    assert libraries.has_own_saving(Diffusion())
    assert libraries.has_own_saving(Hub())
    assert not libraries.has_own_saving(nn.Linear(1, 1))


DEEPSPEED = """
import json, os, sys
import torch
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=sys.argv[2])
import deepspeed
from hf_lora.compat import deepspeed as compat
deepspeed.init_distributed("gloo", verbose=False)
with deepspeed.zero.Init(config_dict_or_path={
    "train_batch_size": 1, "zero_optimization": {"stage": 3}}):
    layer = torch.nn.Linear(3, 2)
weight = layer.weight
told = {
    "partitioned": compat.is_partitioned(weight),
    "plain": compat.is_partitioned(torch.nn.Linear(3, 2).weight),
    "empty": weight.numel(),
    "shape": list(compat.shape_of(weight)),
    "numel": compat.numel_of(weight),
}
with compat.put_together([weight]):
    told["together"] = weight.numel()
    whole = weight.detach().clone()
found, groups = compat.pick_from_part(weight, torch.tensor([0, 4]))
told["picked"] = torch.equal(found, whole.view(-1)[[0, 4]])
told["groups"] = len(groups)
told["engine"] = compat.is_engine(layer), compat.have_engine([weight])
engine, *_ = deepspeed.initialize(model=torch.nn.Linear(3, 2), config={
    "train_batch_size": 1, "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "bf16": {"enabled": True}})
told["around"] = compat.is_engine(engine), compat.have_engine(engine.module.parameters())
open(sys.argv[1], "w").write(json.dumps(told))
"""


def test_ds_shape_ds_tensor_and_their_like_are_what_zero_3_leaves(tmp_path: Path):
    """In a process of its own: DeepSpeed changes the one that imports it."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = run_code(DEEPSPEED, str(tmp_path / "told"), str(port))
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told").read_text())
    assert told == {
        "partitioned": True,
        "plain": False,
        "empty": 0,
        "shape": [2, 3],
        "numel": 6,
        "together": 6,
        "picked": True,
        "groups": 1,
        "engine": [False, False],
        "around": [True, True],
    }
