"""Seq2SeqTrainer on a wrapped T5: generation while it trains, resume, best model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_lora
from tests.integrations import training
from tests.integrations.training import adapter_tensors, same


def t5(seed: int) -> Any:
    config = T5Config(
        vocab_size=len(training.WORDS),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with training.seeded(0):
        model = T5ForConditionalGeneration(config)
    with training.seeded(seed):
        return hf_lora.wrap(model, ["q", "v", "wo"], r=4, dropout=0.1)


def copying(count: int) -> list[dict[str, list[int]]]:
    """Sentences to repeat word for word."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, len(training.WORDS), (count, 4), generator=generator).tolist()
    return [{"input_ids": [*row, 1], "labels": [*row, 1]} for row in rows]


def trainer(model: Any, folder: Path, seen: list[np.ndarray]) -> Seq2SeqTrainer:
    def score(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"score": {1: 0.1, 2: 0.9}.get(len(seen), 0.5)}

    args = Seq2SeqTrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        predict_with_generate=True,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    words = training.tokenizer()
    return Seq2SeqTrainer(
        model,
        args,
        train_dataset=copying(16),
        eval_dataset=copying(4),
        data_collator=DataCollatorForSeq2Seq(words, model=model),
        processing_class=words,
        compute_metrics=score,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seq2SeqTrainer, list[np.ndarray]]:
    seen: list[np.ndarray] = []
    made = trainer(t5(1), tmp_path_factory.mktemp("seq2seq"), seen)
    made.train()
    return made, seen


def test_it_generated_at_every_evaluation(finished: tuple[Seq2SeqTrainer, list[np.ndarray]]):
    _, seen = finished
    assert len(seen) == 3
    for predicted in seen:  # words, not scores of words
        assert predicted.shape[0] == 4
        assert predicted.ndim == 2
        assert np.issubdtype(predicted.dtype, np.integer)


def test_it_ends_with_the_best(finished: tuple[Seq2SeqTrainer, list[np.ndarray]]):
    made, _ = finished
    folder = Path(str(made.args.output_dir))
    assert str(made.state.best_model_checkpoint) == str(folder / "checkpoint-4")
    best, last = (training.saved(folder / f"checkpoint-{step}") for step in (4, 6))
    assert same(training.in_file_names(made.model), best)
    assert not same(best, last)


def test_a_resumed_run_is_equal(finished: tuple[Seq2SeqTrainer, list[np.ndarray]], tmp_path: Path):
    made, _ = finished
    folder = Path(str(made.args.output_dir))
    assert training.files(folder / "checkpoint-2") == training.CHECKPOINT | {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    other = t5(9)
    assert not same(adapter_tensors(other), adapter_tensors(t5(1)))
    resumed = trainer(other, tmp_path, [np.zeros(0)])  # the evaluation at step 2 is behind it
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    last = training.saved(tmp_path / "checkpoint-6")
    assert same(last, training.saved(folder / "checkpoint-6"))


def test_the_adapter_generates_the_same_when_it_is_loaded(
    finished: tuple[Seq2SeqTrainer, list[np.ndarray]], tmp_path: Path
):
    made, _ = finished
    made.model.save_pretrained(tmp_path)
    fresh = hf_lora.unwrap(t5(2))
    hf_lora.load(fresh, tmp_path)
    made.model.eval()
    fresh.eval()  # a model that is made from its configuration, not loaded, is in training mode
    x = torch.tensor([[3, 4, 5, 6, 1]])
    ours, theirs = (m.generate(x, max_length=6, do_sample=False) for m in (made.model, fresh))
    assert torch.equal(ours, theirs)
