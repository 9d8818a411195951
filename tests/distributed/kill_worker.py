"""Run by test_kill.py: a process that ends by SIGKILL while adapters are being saved."""

import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

import hf_lora
from tests.distributed.fsdp_worker import IDS, shard, train, wrap
from tests.integrations import training

STEPS = {"max_steps": 4, "save_steps": 2, "ddp_backend": "gloo"}


def die() -> None:
    """End this process as nothing can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_when_renaming(folder: Path) -> None:
    """End this process when the weights in ``folder`` are written, and not yet in their place."""
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        if Path(target) == folder / "adapter_model.safetensors":
            die()
        replace(source, target)

    os.replace = watched


def trainer_dies(folder: Path) -> None:
    """A run that ends well, and one whose second checkpoint is never finished."""
    for name in ("whole", "killed"):
        trainer = training.trainer(training.wrapped(), folder / name, **STEPS)
        if name == "killed" and int(os.environ["RANK"]) == 0:
            die_when_renaming(folder / "killed" / "checkpoint-4")
        trainer.train()


def trainer_resumes(folder: Path) -> bool:
    """Go on from the last checkpoint that was finished; say whether the end is the same."""
    trainer = training.trainer(training.wrapped(seed=9), folder / "killed", **STEPS)
    trainer.train(resume_from_checkpoint=str(folder / "killed" / "checkpoint-2"))
    there = training.saved(folder / "whole" / "checkpoint-4")
    return training.same(training.in_file_names(trainer.model), there)


def sharded_dies(folder: Path) -> None:
    """Save a sharded model, train on, and save again over it; one process does not survive."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = shard(wrap(training.llama()))
    hf_lora.save(model, folder / "adapter")
    for _ in train(model, IDS):
        pass
    if rank == int(os.environ["VICTIM"]):
        if rank == 0:
            die_when_renaming(folder / "adapter")
        else:
            die()  # the others wait for its part
    hf_lora.save(model, folder / "adapter")
    (folder / f"survived-{rank}").touch()
