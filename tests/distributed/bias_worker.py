"""Run by test_biases.py in each process: biases that train on models that several share."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hf_lora
from tests.distributed import deepspeed_worker
from tests.distributed.fsdp_worker import IDS, gathered, refusal, train
from tests.distributed.tp_worker import load, write_bases
from tests.integrations import training

BIASES: dict[str, Any] = {"targets": ["q_proj", "down_proj"], "r": 2, "bias": "all",
                          "lora_bias": True}  # fmt: skip


@torch.no_grad()
def base() -> Any:
    """A base whose biases say something."""
    model = training.llama(attention_bias=True, mlp_bias=True)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3, generator=generator)
    return model


def wrap(model: Any) -> Any:
    """Wrap it, from a seed."""
    with training.seeded(1):
        return hf_lora.wrap(model, **BIASES)


def shard(model: Any) -> Any:
    """Shard a model over all processes, layer by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def partitioned(folder: Path) -> None:
    """Wrap a base that DeepSpeed's ZeRO-3 has in parts, and save it."""
    deepspeed_worker.start()
    if dist.get_rank() == 0:
        base().save_pretrained(folder / "base")
    dist.barrier()
    model = wrap(deepspeed_worker.load_base(folder, deepspeed_worker.config(3, keep=0)))
    hf_lora.save(model, folder / "parts")


def everything(folder: Path) -> dict[str, Any]:
    """Train wrapped before and after sharding; ask for biases under tensor parallelism."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    told: dict[str, Any] = {}
    for name, model in {"before": shard(wrap(base())), "after": wrap(shard(base()))}.items():
        told[name] = list(train(model, IDS.chunk(world)[rank]))
        hf_lora.save(model, folder / name)
        loaded = hf_lora.load(shard(base()), folder / name)
        told[f"{name} loaded"] = training.same(gathered(loaded), gathered(model))
    if rank == 0:
        write_bases(folder)
    dist.barrier()
    split = load(folder)
    told["split"] = {
        field: refusal(lambda field=field, value=value: hf_lora.wrap(split, **{
            "targets": ["q_proj"], "r": 2, field: value}))
        for field, value in (("bias", "lora_only"), ("bias", "all"), ("lora_bias", True))
    }  # fmt: skip
    return told
