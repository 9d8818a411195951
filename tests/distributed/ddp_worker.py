"""Run by test_ddp.py in each process: data-parallel runs of Trainer, and what they leave."""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

import hf_lora
from tests import moving
from tests.integrations import training

STEPS = {"max_steps": 4, "save_steps": 2, "ddp_backend": "gloo"}


@dataclasses.dataclass
class Start(TrainerCallback):
    """Keeps what a run begins with, after the model was put into DDP."""

    kept: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept = total(kwargs["model"])


def rank() -> int:
    """Which process this is."""
    return int(os.environ["RANK"])


def total(model: Any) -> float:
    """The sum of everything that adapters hold: equal on two ranks that hold the same."""
    return sum(float(t.double().sum()) for t in training.adapter_tensors(model).values())


def resuming(folder: Path) -> dict[str, Any]:
    """Train, resume from the middle, end with the best; tell what this process has then.

    Every process draws its adapters from another seed.
    """
    start = Start()

    def run(seed: int, name: str, resume: Path | None = None, **fields: Any) -> Any:
        trainer = training.trainer(
            training.wrapped(seed=seed + rank()),
            folder / name,
            eval_dataset=training.tokens(4, seed=8),
            eval_strategy="steps",
            eval_steps=2,
            callbacks=[start],
            **STEPS,
            **fields,
        )
        drawn.append(total(trainer.model))
        with warnings.catch_warnings(record=True) as told:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        warned.extend(str(each.message) for each in told)
        return trainer

    drawn: list[float] = []
    warned: list[str] = []
    first = run(1, "first")
    begun = start.kept
    checkpoint = folder / "first" / "checkpoint-2"
    second = run(9, "second", checkpoint)
    best = run(3, "best", load_best_model_at_end=True)
    there = training.saved(best.state.best_model_checkpoint)
    tensors = [training.adapter_tensors(trainer.model) for trainer in (first, second)]
    return {
        "processes": first.args.world_size,
        "around the model": type(first.model_wrapped).__name__,
        "looks for unused": first.model_wrapped.find_unused_parameters,
        "drawn": drawn[0],
        "begun with": begun,
        "files": sorted(training.files(checkpoint)),
        "resumed equal": training.same(*tensors),
        "best equal": training.same(training.in_file_names(best.model), there),
        "sum": total(first.model),
        "warnings": [text for text in warned if "unused" in text],
    }


def comparing(folder: Path) -> dict[str, Any]:
    """Train without dropout, so that one process can do the same; leave gradients and adapters."""
    told = {}
    for name, fields in COMPARED.items():
        gradients = training.Gradients()
        trainer = training.trainer(
            training.wrapped(dropout=0.0),
            folder / name,
            callbacks=[gradients],
            ddp_backend="gloo",
            **fields,
            per_device_train_batch_size=2,
        )
        trainer.train()
        if rank() == 0:
            hf_lora.save(trainer.model, folder / name / "end")
            save_file(gradients.kept, folder / name / "gradients.safetensors")
        told[name] = {
            "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            "sum": total(trainer.model),
        }
    return told


def with_moving_buffers(folder: Path) -> dict[str, Any]:
    """Train on rows of one's own what moves a buffer, switched in the middle or not; save both."""
    torch.distributed.init_process_group("gloo")
    x = moving.X * (rank() + 1)
    base = moving.answer(moving.around(moving.Running))
    told: dict[str, Any] = {}
    for name in ("switched", "left alone"):
        torch.manual_seed(4)
        model = hf_lora.wrap(moving.around(moving.Running), "fc", r=2)
        parallel = DistributedDataParallel(model)
        for _ in range(3):
            moving.train(parallel, 1, x=x)
            if name == "switched":
                with hf_lora.no_adapter(model):
                    model(x)
        if rank() == 0:
            hf_lora.save(parallel, folder / name)
        with hf_lora.no_adapter(model):
            told[f"{name}: base"] = torch.equal(moving.answer(model), base)
        moving.train(parallel, 1, x=x)  # whose beginning takes over what the first process has
        told[name] = [model.inner.mean.tolist(), model.inner.steps.item()]
    return told


EVEN = {"max_steps": 4, "save_strategy": "no", "max_grad_norm": 0.0}
COMPARED: dict[str, dict[str, Any]] = {
    "plain": {**EVEN, "gradient_accumulation_steps": 1},
    "accumulated": {**EVEN, "gradient_accumulation_steps": 2},
    # seven rows, in order: the last step of an epoch has one row less than the processes want
    "uneven": {
        **EVEN,
        "gradient_accumulation_steps": 1,
        "train_dataset": training.tokens(7),
        "train_sampling_strategy": "sequential",
    },
}
