"""Run by test_rows.py: trainings of rows of tied embeddings in several ways."""

from pathlib import Path
from typing import Any

from hf_lora.model.registry import registry_of
from tests.distributed import trainer_worker
from tests.distributed.tied_worker import KINDS, RESUMED

LORA: dict[str, Any] = {
    "targets": ["q_proj", "v_proj"], "r": 4, "train_rows": {"lm_head": [3, 7, 11, 40]},
}  # fmt: skip


def run(folder: Path, kind: str, name: str, resume: Path | None = None) -> dict[str, Any]:
    """Train in one way, and tell what it has come to."""
    trainer = trainer_worker.run(folder, kind, name, resume, LORA)[0]
    registry = registry_of(trainer.accelerator.unwrap_model(trainer.model))
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "rows": [key for key, _ in registry.parameters("default") if "lora_rows" in key],
        "held once": len(held) == len({*held}),
    }


def all_ways(folder: Path) -> dict[str, Any]:
    """Train in all ways, and go on from the middle in some."""
    found = {kind: run(folder, kind, kind) for kind in KINDS}
    for kind in RESUMED:
        run(folder, kind, f"{kind} again", folder / kind / "checkpoint-2")
    return found
