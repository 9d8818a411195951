"""Run by test_fsdp1.py in each process: models that meet PyTorch's FullyShardedDataParallel."""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import hf_lora
from hf_lora import StateError
from tests.integrations import training
from tests.snapshot import snapshot

shard = functools.partial(FullyShardedDataParallel, use_orig_params=True)


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    """Return what a call says that is to be refused."""
    try:
        call(*args, **kwargs)
    except StateError as error:
        return str(error)
    return ""


def meeting(folder: Path) -> dict[str, Any]:
    """Put it around our models, and our adapters on its; then go the way that the errors name."""
    dist.init_process_group("gloo")
    blocks = ModuleWrapPolicy({type(training.llama().model.layers[0])})
    told: dict[str, Any] = {}
    for name, fields in {"factors": {}, "a head": {"train": ["lm_head"]}}.items():
        model = training.wrapped(**fields)
        before = snapshot(model)
        told[name] = [
            refused(shard, model),
            refused(shard, model, auto_wrap_policy=blocks),
            refused(FullyShardedDataParallel, model),
            refused(shard, nn.Sequential(model)),
            refused(shard, model.model.layers[0]),
        ]
        told[f"{name}: as before"] = snapshot(model) == before
    plain = training.llama()
    blockwise = shard(plain, auto_wrap_policy=blocks, device_id=torch.device("cpu"))
    hf_lora.save(training.wrapped(), folder / str(dist.get_rank()))
    told["sharded before"] = [
        refused(hf_lora.wrap, each, targets="q_proj", r=2) for each in (blockwise, plain)
    ] + [refused(hf_lora.load, blockwise, folder / str(dist.get_rank()))]
    ids = torch.arange(1, 9)[None]
    told["a plain model is its own"] = blockwise(input_ids=ids, labels=ids).loss.item()
    told["plain"] = training.llama()(input_ids=ids, labels=ids).loss.item()
    model = training.wrapped(train=["lm_head"], dropout=0.0)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(input_ids=ids, labels=ids).loss.backward()
    hf_lora.save(model, folder / "second")
    return told
