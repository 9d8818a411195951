"""Rows under Trainer: they are all that a checkpoint holds, and a run resumes to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lora
from tests.integrations import training
from tests.integrations.training import adapter_tensors, run, same

ROWS = [3, 7, 11, 40]


def wrapped(tied: bool, seed: int = 0) -> Any:
    model = training.llama(seed, tie_word_embeddings=tied)
    return hf_lora.wrap(model, (), train_rows={"embed_tokens": ROWS})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tied: bool, tmp_path: Path):
    whole = run(tmp_path / "whole", model=wrapped(tied))
    assert training.same(training.base_tensors(whole.model), whole.base_before)
    first = tmp_path / "whole" / "checkpoint-4"
    (saved,) = training.saved(first).values()
    assert saved.shape == (len(ROWS), 32)
    assert (first / "adapter_model.safetensors").stat().st_size < 20_000
    assert not (first / "model.safetensors").exists()
    resumed = run(tmp_path / "again", model=wrapped(tied), resume=str(first))
    assert same(adapter_tensors(resumed.model), adapter_tensors(whole.model))
    (rows,) = adapter_tensors(whole.model).values()
    assert not torch.equal(rows, saved)


@pytest.mark.parametrize(
    "fields",
    [{"targets": ["lm_head"], "r": 2}, {"targets": (), "train_rows": {"lm_head": ROWS}}],
    ids=["update", "rows"],
)
def test_a_head_that_is_called_in_an_evaluation_is_heard(
    fields: dict[str, Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    model = hf_lora.wrap(training.llama(0), **fields)
    training.trainer(model, tmp_path, eval_dataset=training.tokens(seed=9)).evaluate()
    assert not [w for w in recwarn if issubclass(w.category, hf_lora.HfLoRAWarning)]


def test_the_best_rows_are_loaded_at_the_end(tmp_path: Path):
    best = run(
        tmp_path,
        model=wrapped(True),
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        eval_dataset=training.tokens(seed=9),
    )
    chosen = best.trainer.state.best_model_checkpoint
    (saved,) = training.saved(chosen).values()
    (rows,) = adapter_tensors(best.model).values()
    assert torch.equal(rows, saved)
    assert best.model.lm_head.lora_rows is best.model.model.embed_tokens.lora_rows
