"""Run by test_deepspeed.py in each process: Trainer and accelerate under ZeRO-2 and ZeRO-3."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, PartialState
from transformers import LlamaForCausalLM, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import hf_lora
from hf_lora.files.manifest import MANIFEST_FILE
from tests.distributed import bytes_worker
from tests.distributed.deepspeed_worker import (
    FEW,
    LORA,
    config,
    gathered,
    optimizer_of,
    start,
    wrap,
)
from tests.distributed.fsdp_worker import refusal
from tests.integrations import training

KINDS = {"zero2": 2, "zero3": 3}
RUN: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 1,
}
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "greater_is_better": True,  # of the loss, so that it is not the last that is the best
}


def run(folder: Path, kind: str, name: str, resume: Path | None = None, **fields: Any) -> Any:
    """Train with Trainer by one process or by DeepSpeed; returns the trainer."""
    if kind != "alone":
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        stage = config(KINDS[kind], 0)["zero_optimization"]
        fields |= {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
        fields["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": stage,
        }
    world = 1 if kind == "alone" else 2
    fields["per_device_train_batch_size"] = RUN["per_device_train_batch_size"] * 2 // world
    # first the arguments: from_pretrained then loads in parts, where ZeRO-3 is asked for
    arguments = training.arguments(folder / name, **(RUN | fields))
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    other = kind != "alone" and int(os.environ["RANK"]) > 0
    with training.seeded(9 if resume or other else 1):
        hf_lora.wrap(model, **LORA)
    training.speed_up_collection()
    data = {"train_dataset": training.tokens(), "eval_dataset": training.tokens(4, seed=8)}
    trainer = Trainer(model=model, args=arguments, **data)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    unset_hf_deepspeed_config()
    return trainer


def trainers(folder: Path) -> dict[str, Any]:
    """Train with Trainer, resume, and end with the best."""
    start()
    told: dict[str, Any] = {}
    for kind in KINDS:
        trainer = run(folder, kind, kind)
        told[kind] = {
            "around": type(trainer.model_wrapped).__name__,
            "processes": trainer.args.world_size,
            "optimizer": type(trainer.model_wrapped.optimizer).__name__,
            "weight": list(trainer.model.lm_head.weight.shape),
            "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        }
        run(folder, kind, f"{kind} resumed", folder / kind / "checkpoint-2")
        best = run(folder, kind, f"{kind} best", **BEST)
        told[f"{kind} best"] = {
            "checkpoint": Path(best.state.best_model_checkpoint).name,
            "sum": sum(float(t.double().sum()) for t in gathered(best.model).values()),
        }
        mixed = folder / f"{kind} mixed"
        if dist.get_rank() == 0:
            shutil.copytree(folder / kind / "checkpoint-2", mixed)
            later = folder / kind / "checkpoint-4" / "adapter_model.safetensors"
            shutil.copy(later, mixed / later.name)
            (mixed / MANIFEST_FILE).unlink()  # which would say so at once
        dist.barrier()
        told[f"{kind} mixed"] = refusal(lambda kind=kind, at=mixed: run(folder, kind, "never", at))
    return told


def loops(folder: Path) -> dict[str, Any]:
    """Train in a loop of accelerate's; save and load its states, registered."""
    start()
    told: dict[str, Any] = {}
    rank = dist.get_rank()
    for kind, stage in KINDS.items():
        first = _Loop(folder, stage, seed=1 + rank)
        first.train()
        first.accelerator.save_state(str(folder / f"{kind} state"))
        saved = gathered(first.model)
        first.train()
        again = _Loop(folder, stage, seed=9)
        again.accelerator.load_state(str(folder / f"{kind} state"))
        exact = training.same(gathered(again.model), saved)
        again.train()
        told[kind] = {
            "type": str(first.accelerator.distributed_type),
            "processes": first.accelerator.num_processes,
            "loaded": exact,
            "goes on": training.same(gathered(again.model), gathered(first.model)),
            "files": sorted(training.files(folder / f"{kind} state")),
        }
        first.accelerator.save_model(first.model, folder / f"{kind} model")
        first.model.destroy()
        again.model.destroy()
    return told


class _Loop:
    """A loop of accelerate's under DeepSpeed."""

    def __init__(self, folder: Path, stage: int, seed: int):
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = DeepSpeedPlugin(hf_ds_config=config(stage, 0), zero3_init_flag=stage == 3)
        gloo = InitProcessGroupKwargs(backend="gloo")
        self.accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])
        hf_lora.register(self.accelerator)
        model = wrap(LlamaForCausalLM.from_pretrained(folder / "base"), seed=seed)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer_of(model))

    def train(self) -> None:
        """Take two steps on this process's rows."""
        self.model.train()
        rows = FEW.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        for _ in range(2):
            loss = self.model(input_ids=rows, labels=rows).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()


def by_others(folder: Path) -> dict[str, Any]:
    """All in which another library drives DeepSpeed."""
    told = {"trainers": trainers(folder), "loops": loops(folder)}
    return {**told, "sent": bytes_worker.zero()}
