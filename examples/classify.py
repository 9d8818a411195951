"""Fine-tune a sentence encoder into a classifier: LoRA inside, a fresh head trained in full.

    python examples/classify.py            # is a word in a good or a bad mood? MiniLM, on a CPU
    python examples/classify.py --quick    # fewer steps

`train=["classifier"]` is all that the fresh head needs: it is trained in full, saved with the
adapter, and comes back with it onto a base whose own head is as random as this one was.
"""

import argparse

import assets
import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_lora

OUTPUT = "outputs/classify"
LABELS = {0: "bad", 1: "good"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    args = parser.parse_args()
    train, test = assets.sentiments()
    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    model = fresh_classifier(seed=0)
    model = hf_lora.wrap(model, targets=["query", "value"], train=["classifier"], r=8, alpha=16)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            OUTPUT,
            max_steps=60 if args.quick else 600,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=100,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=encode(tokenizer, train),
        eval_dataset=encode(tokenizer, test),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    print(f"\nheld-out accuracy: {before:.1%} before, {after:.1%} after")

    model.save_pretrained(f"{OUTPUT}/adapter")
    fresh = hf_lora.load(fresh_classifier(seed=1).to(model.device), f"{OUTPUT}/adapter")
    words = ["delightful", "dreadful", "serendipity", "overpriced"]
    batch = tokenizer(words, padding=True, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        mine, reloaded = model.eval()(**batch).logits, fresh(**batch).logits
    for word, label in zip(words, reloaded.argmax(-1).tolist(), strict=True):
        print(f"  {word}: {LABELS[label]}")
    assert torch.equal(mine, reloaded)
    print("reloaded onto a base with another random head: the outputs are equal to the last bit")


def fresh_classifier(seed: int) -> torch.nn.Module:
    """Return the pretrained encoder under a head of random weights."""
    set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(assets.minilm(), id2label=LABELS)


def encode(tokenizer, rows: list[tuple[str, int]]) -> list[dict]:
    """Return one example for each (word, label)."""
    return [{**tokenizer(word), "label": label} for word, label in rows]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of words whose likelier label is the right one."""
    right = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


if __name__ == "__main__":
    main()
