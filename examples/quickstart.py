"""Teach a small chat model British spelling: plan, wrap, train, save, reload.

    python examples/quickstart.py                           # SmolLM2-135M-Instruct; fine on a CPU
    python examples/quickstart.py --quick                   # fewer steps
    python examples/quickstart.py --model Qwen/Qwen3-0.6B   # any causal language model on the Hub

It is tested on words that never occur in training, and neither do words that begin like them.
"""

import argparse
from pathlib import Path

import assets
import torch
from spelling import PROMPT, fastest_dtype, for_trainer, plot, report
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import hf_lora

OUTPUT = Path("outputs/quickstart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="id on the Hub, or a folder")
    parser.add_argument("--quick", action="store_true", help="fewer steps, fewer tests")
    args = parser.parse_args()
    source = args.model or assets.smollm2()
    train, test = assets.spellings(held_out=20 if args.quick else 200)
    set_seed(0)

    # The model, and what hf_lora would do to it; then do it.
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    how = {"dtype": fastest_dtype(), "attn_implementation": "eager"}  # quickest on short rows
    model = AutoModelForCausalLM.from_pretrained(source, **how)
    print(hf_lora.plan(model, targets="all-linear", r=16), "\n")
    model = hf_lora.wrap(model, targets="all-linear", r=16)

    # The plain Trainer does the rest.
    settings = TrainingArguments(
        str(OUTPUT),
        max_steps=12 if args.quick else 80,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=5,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(model=model, args=settings, **for_trainer(tokenizer, train, test))
    before = report("before", trainer, tokenizer, test)
    trainer.train()
    after = report("after", trainer, tokenizer, test)
    plot(trainer.state.log_history, before, after, OUTPUT / "loss.png")

    # Save the adapter, put it on a fresh base, and see that nothing was lost.
    model.save_pretrained(OUTPUT / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(source, **how).to(model.device)
    whole = fresh.get_memory_footprint()
    fresh = hf_lora.load(fresh, OUTPUT / "adapter")
    adapter = (OUTPUT / "adapter/adapter_model.safetensors").stat().st_size
    print(f"\nthe adapter has {adapter / 1e6:.1f} MB, the model {whole / 1e6:.1f} MB")
    words = tokenizer(PROMPT.format("gray"), return_tensors="pt").to(model.device)
    assert torch.equal(model(**words).logits, fresh(**words).logits)
    print("reloaded onto a fresh base: the outputs are equal to the last bit")


if __name__ == "__main__":
    main()
