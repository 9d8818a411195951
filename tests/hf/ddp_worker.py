"""Run by test_ddp.py, twice at once: one process of a data-parallel run."""

from pathlib import Path
from typing import Any

from tests.hf import training


def main(folder: Path) -> dict[str, Any]:
    """Train, resume from the middle, end with the best; tell what this process has then."""

    def run(seed: int, name: str, resume: Path | None = None, **fields: Any) -> Any:
        trainer = training.trainer(
            training.wrapped(seed=seed),
            folder / name,
            max_steps=4,
            save_steps=2,
            eval_dataset=training.tokens(4, seed=8),
            eval_strategy="steps",
            eval_steps=2,
            ddp_backend="gloo",
            **fields,
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    first = run(1, "first")
    checkpoint = folder / "first" / "checkpoint-2"
    second = run(9, "second", checkpoint)
    best = run(3, "best", load_best_model_at_end=True)
    there = training.saved(best.state.best_model_checkpoint)
    tensors = [training.adapter_tensors(trainer.model) for trainer in (first, second)]
    return {
        "processes": first.args.world_size,
        "around the model": type(first.model_wrapped).__name__,
        "files": sorted(training.files(checkpoint)),
        "resumed equal": training.same(*tensors),
        "best equal": training.same(training.in_file_names(best.model), there),
        "sum": sum(float(t.double().sum()) for t in tensors[0].values()),
    }
