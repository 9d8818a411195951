"""Adapt one tower of a model that sees and writes: LLaVA, on pictures that were inverted.

    python examples/vision_language.py            # minutes on a CPU
    python examples/vision_language.py --quick    # under a minute

There is no pretrained model of this size to fetch, so a small LLaVA first learns to write the
number that it sees in scikit-learn's digits. Inverted, it reads none. Only its eye has to learn
that: `vision_tower` alone is adapted, and the plan says that the language model is left as it is.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_lora

OUTPUT = "outputs/vision_language"
TARGETS = [r"vision_tower\..*(q|k|v|out)_proj", r"vision_tower\..*fc\d"]
TEST, PATCHES = 300, 16
IMAGE, BEGIN, QUESTION, FIRST = 15, 1, 2, 3
"""Tokens: a place for a patch, the beginning, a question mark, and the digit 0."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    args = parser.parse_args()
    steps = 150 if args.quick else 1500
    set_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=2, num_channels=1),
        text_config=LlamaConfig(**sizes, vocab_size=16, num_key_value_heads=4),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    train(model, steps, inverted=False)
    model.save_pretrained(f"{OUTPUT}/base")

    model = LlavaForConditionalGeneration.from_pretrained(f"{OUTPUT}/base")
    first, before = accuracy(model, inverted=False), accuracy(model, inverted=True)
    plan = hf_lora.plan(model, targets=TARGETS, r=8)
    print(plan)
    model = hf_lora.wrap(model, targets=TARGETS, r=8)
    train(model, steps, inverted=True)
    print(f"\npictures that the base names right: {first:.1%}")
    print(f"inverted ones: {before:.1%} before, {accuracy(model, inverted=True):.1%} after")

    model.save_pretrained(f"{OUTPUT}/adapter")
    fresh = hf_lora.from_pretrained(f"{OUTPUT}/adapter", trainable=True)
    rows = pictures(inverted=True)[:8]
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "pixel_values")}
    with torch.inference_mode():
        mine, again = (m.eval()(**batch).logits for m in (model, fresh))
    assert torch.equal(mine, again)
    print("reloaded onto the base: the outputs are equal to the last bit")


def pictures(inverted: bool, test: bool = True) -> list[dict]:
    """Return pictures to train or to test on, each with a question and its answer."""
    found = load_digits()
    pixels = torch.tensor(found.images / 8 - 1, dtype=torch.float32).unsqueeze(1)
    pixels = -pixels if inverted else pixels
    rows = []
    for picture, digit in zip(pixels, found.target.tolist(), strict=True):
        ids = torch.tensor([BEGIN] + [IMAGE] * PATCHES + [QUESTION, FIRST + digit])
        labels = torch.full_like(ids, -100)
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": picture})
    return rows[-TEST:] if test else rows[:-TEST]


def train(model: torch.nn.Module, steps: int, inverted: bool) -> None:
    """Train a model on pictures of one kind."""
    Trainer(
        model=model,
        args=TrainingArguments(
            OUTPUT,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=pictures(inverted, test=False),
    ).train()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, inverted: bool) -> float:
    """Return the share of held-out pictures of which the number is written."""
    rows = pictures(inverted)
    device = next(model.parameters()).device
    batch = {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}
    said = model.eval()(**batch).logits[:, -2].argmax(-1)
    return float((said == batch["labels"][:, -1]).float().mean())


if __name__ == "__main__":
    main()
