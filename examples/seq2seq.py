"""Sequence to sequence with the plain Seq2SeqTrainer: a tiny T5 learns a second skill.

    python examples/seq2seq.py            # no pretrained model and no Hub; a CPU will do
    python examples/seq2seq.py --quick    # fewer steps

The base, trained in full first, says what becomes of an American word in British: "er>re". The
adapter makes the same model say of a word whether it is American or British; switched off, it
leaves nothing of itself behind.
"""

import argparse

import assets
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

import hf_lora

OUTPUT = "outputs/seq2seq"
Pairs = list[tuple[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    steps = 120 if parser.parse_args().quick else 600
    parts = assets.spellings()
    origins = [
        [*((us, "American") for us, _ in p), *((uk, "British") for _, uk in p)] for p in parts
    ]
    changes = [[(us, change(us, uk)) for us, uk in part] for part in parts]
    set_seed(0)
    tokenizer = train_tokenizer([text for pair in origins[0] + changes[0] for text in pair])
    model = tiny_t5(tokenizer)

    base = make_trainer(model, tokenizer, *changes, steps)
    base.train()
    before = accuracy(base, "what changes, the base")

    model = hf_lora.wrap(model, targets="all-linear", r=16)
    trainer = make_trainer(model, tokenizer, *origins, steps)
    accuracy(trainer, "American or British, before training")
    trainer.train()
    accuracy(trainer, "American or British, with the adapter")
    with hf_lora.no_adapter(model):
        assert accuracy(base, "what changes, the adapter off") == before
    model.save_pretrained(f"{OUTPUT}/adapter")


def change(american: str, british: str) -> str:
    """Return what is replaced by what: "er>re" for center and centre, ">u" for color."""
    start = shared_start(american, british)
    american, british = american[start:], british[start:]
    end = shared_start(american[::-1], british[::-1])
    return f"{american[: len(american) - end]}>{british[: len(british) - end]}"


def shared_start(one: str, other: str) -> int:
    """Return the number of letters that two words begin with together."""
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))


def train_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer that has seen exactly these words."""
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    how = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=list(special.values()), show_progress=False
    )
    tokenizer.train_from_iterator(words, how)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_t5(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """Return a T5 of half a million random weights."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_heads=4,
        num_layers=2,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5ForConditionalGeneration(config)


def make_trainer(model, tokenizer, train: Pairs, test: Pairs, steps: int) -> Seq2SeqTrainer:
    """Return the plain trainer for (question, answer) pairs."""

    def exact_match(prediction) -> dict[str, float]:
        answers = np.where(prediction.label_ids < 0, tokenizer.pad_token_id, prediction.label_ids)
        given = tokenizer.batch_decode(prediction.predictions, skip_special_tokens=True)
        wanted = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return {"accuracy": float(np.mean([g == w for g, w in zip(given, wanted, strict=True)]))}

    def encode(pairs: Pairs) -> list[dict]:
        return [
            {**tokenizer(word), "labels": tokenizer(answer)["input_ids"]} for word, answer in pairs
        ]

    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            OUTPUT,
            max_steps=steps,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=256,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            predict_with_generate=True,
            generation_max_length=8,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=encode(train),
        eval_dataset=encode(test),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=exact_match,
    )


def accuracy(trainer: Seq2SeqTrainer, what: str) -> float:
    """Print and return the share of held-out questions that are answered exactly."""
    share = trainer.evaluate()["eval_accuracy"]
    print(f"{what}: {share:.1%} right")
    return share


if __name__ == "__main__":
    main()
