"""QLoRA: train an adapter on a base that stays in 4 bits, then use it on the full base as well.

    python examples/qlora.py            # needs bitsandbytes; a CPU will do
    python examples/qlora.py --quick    # fewer steps

The task is the quickstart's: British spelling, tested on words that never occur in training.
"""

import argparse

import assets
import torch
from spelling import fastest_dtype, for_trainer, score
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_lora

OUTPUT = "outputs/qlora"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, fewer tests")
    args = parser.parse_args()
    train, test = assets.spellings(held_out=20 if args.quick else 200)
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    full = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=fastest_dtype())
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=fastest_dtype()
    )
    model = AutoModelForCausalLM.from_pretrained(
        assets.smollm2(), dtype=fastest_dtype(), quantization_config=four_bits
    )
    sizes = [m.get_memory_footprint() / 1e6 for m in (full, model)]
    print(f"the base takes {sizes[0]:.0f} MB, in 4 bits {sizes[1]:.0f} MB")
    model = hf_lora.wrap(model, targets="all-linear", r=16)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            OUTPUT,
            max_steps=9 if args.quick else 120,
            per_device_train_batch_size=16,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        **for_trainer(tokenizer, train, test),
    )
    with hf_lora.no_adapter(model):
        print(f"4-bit base alone:         {score(model, tokenizer, test):.0%} spelled right")
    trainer.train()
    print(f"4-bit base and adapter:   {score(model, tokenizer, test):.0%} spelled right")

    # The adapter is an ordinary one: it fits the base that was never quantized, too.
    model.save_pretrained(f"{OUTPUT}/adapter")
    full = hf_lora.load(full.to(model.device), f"{OUTPUT}/adapter")
    print(f"16-bit base and adapter:  {score(full, tokenizer, test):.0%} spelled right")


if __name__ == "__main__":
    main()
