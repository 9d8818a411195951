"""Run by test_tied.py: trainings of tied embeddings in several ways, and what they come to."""

from pathlib import Path
from typing import Any

from hf_lora.model.registry import registry_of
from tests.distributed import trainer_worker

LORA: dict[str, Any] = {"targets": ["q_proj", "v_proj"], "r": 4, "train": ["lm_head"]}
KINDS = ["ddp", "native", "plugin from the first"]
RESUMED = ["plugin from the first"]


def run(folder: Path, kind: str, name: str, resume: Path | None = None) -> Any:
    """Train in one way; returns the trainer."""
    return trainer_worker.run(folder, kind, name, resume, LORA)[0]


def told(trainer: Any) -> dict[str, Any]:
    """What a run has come to."""
    registry = registry_of(trainer.accelerator.unwrap_model(trainer.model))
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "copies": [key for key, _ in registry.parameters("default") if "lora_copy" in key],
        "held once": len(held) == len({*held}),
    }


def all_ways(folder: Path) -> dict[str, Any]:
    """Train in all ways, and go on from the middle in some."""
    found = {kind: told(run(folder, kind, kind)) for kind in KINDS}
    for kind in RESUMED:
        run(folder, kind, f"{kind} again", folder / kind / "checkpoint-2")
    return found


def one_way(folder: Path) -> dict[str, Any]:
    """Train by accelerate's FSDP2."""
    return told(run(folder, "plugin", "plugin"))
