"""Adapt a vision transformer to another kind of picture: digits on their side.

    python examples/vision.py            # two minutes on a CPU
    python examples/vision.py --quick    # seconds

There is no pretrained model of this size to fetch, so a small ViT first learns scikit-learn's 1,797
handwritten digits, as any base did. It reads none that lies on its side; an adapter learns that.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import (
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import hf_lora

OUTPUT = "outputs/vision"
TEST = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    args = parser.parse_args()
    steps = 150 if args.quick else 1000
    set_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=10,
    )
    train(ViTForImageClassification(config), steps, turned=False).save_model(f"{OUTPUT}/base")

    model = ViTForImageClassification.from_pretrained(f"{OUTPUT}/base")
    upright, before = accuracy(model, turned=False), accuracy(model, turned=True)
    print(hf_lora.plan(model, targets=["attention", "mlp"], r=8))
    model = hf_lora.wrap(model, targets=["attention", "mlp"], r=8)
    train(model, steps, turned=True)
    print(f"\nupright digits read by the base: {upright:.1%}")
    print(f"digits on their side: {before:.1%} before, {accuracy(model, turned=True):.1%} after")

    model.save_pretrained(f"{OUTPUT}/adapter")
    fresh = hf_lora.from_pretrained(f"{OUTPUT}/adapter", trainable=True)
    batch = torch.stack([row["pixel_values"] for row in digits(turned=True)[:8]])
    with torch.inference_mode():
        assert torch.equal(model.eval()(batch).logits, fresh.eval()(batch).logits)
    print("reloaded onto the base: the outputs are equal to the last bit")
    with hf_lora.no_adapter(model):
        print(f"without the adapter it reads upright ones: {accuracy(model, turned=False):.1%}")


def digits(turned: bool, test: bool = True) -> list[dict]:
    """Return digits to train or to test on, as they are or on their side."""
    found = load_digits()
    pictures = np.rot90(found.images, axes=(1, 2)).copy() if turned else found.images
    pixels = torch.tensor(pictures / 8 - 1, dtype=torch.float32).unsqueeze(1)
    rows = zip(pixels, found.target.tolist(), strict=True)
    examples = [{"pixel_values": x, "labels": label} for x, label in rows]
    return examples[-TEST:] if test else examples[:-TEST]


def train(model: torch.nn.Module, steps: int, turned: bool) -> Trainer:
    """Train a model on upright or on turned digits."""
    trainer = make(model, steps)
    trainer.train_dataset = digits(turned, test=False)
    trainer.train()
    return trainer


def accuracy(model: torch.nn.Module, turned: bool) -> float:
    """Return the share of held-out digits that are read right."""
    return make(model, 1).evaluate(digits(turned))["eval_accuracy"]


def make(model: torch.nn.Module, steps: int) -> Trainer:
    def right(prediction: EvalPrediction) -> dict[str, float]:
        return {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
        }

    return Trainer(
        model=model,
        args=TrainingArguments(
            OUTPUT,
            max_steps=steps,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=300,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        compute_metrics=right,
    )


if __name__ == "__main__":
    main()
