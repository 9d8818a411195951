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
from matplotlib.figure import Figure
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_lora

OUTPUT = Path("outputs/quickstart")
PROMPT = "American: {}\nBritish:"
NEW_WORDS = ["tokenization", "quantized", "hyperparameterization", "my favorite color"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="id on the Hub, or a folder")
    parser.add_argument("--quick", action="store_true", help="fewer steps, fewer tests")
    args = parser.parse_args()
    source = args.model or assets.smollm2()
    train, test = assets.spellings(held_out=50 if args.quick else 200)
    set_seed(0)

    # The model, and what hf_lora would do to it; then do it.
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load_base(source)
    print(hf_lora.plan(model, targets="all-linear", r=16), "\n")
    model = hf_lora.wrap(model, targets="all-linear", r=16)

    # The plain Trainer does the rest.
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(OUTPUT),
            max_steps=20 if args.quick else 80,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=5,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=[encode(tokenizer, *pair) for pair in train],
        eval_dataset=[encode(tokenizer, *pair) for pair in test],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    before = report("before", trainer, tokenizer, test)
    trainer.train()
    after = report("after", trainer, tokenizer, test)
    plot(trainer.state.log_history, before, after)

    # Save the adapter, put it on a fresh base, and see that nothing was lost.
    model.save_pretrained(OUTPUT / "adapter")
    fresh = load_base(source)
    whole = fresh.get_memory_footprint()
    fresh = hf_lora.load(fresh.to(model.device), OUTPUT / "adapter")
    adapter = (OUTPUT / "adapter/adapter_model.safetensors").stat().st_size
    print(f"\nthe adapter has {adapter / 1e6:.1f} MB, the model {whole / 1e6:.1f} MB")
    words = tokenizer(PROMPT.format("gray"), return_tensors="pt").to(model.device)
    assert torch.equal(model(**words).logits, fresh(**words).logits)
    print("reloaded onto a fresh base: the outputs are equal to the last bit")


def load_base(source: str):
    """Return the pretrained model, with the attention that is fastest on rows of a few tokens."""
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=fastest_dtype(), attn_implementation="eager"
    )


def fastest_dtype() -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it, else float32."""
    cpu = torch.cpu.get_capabilities()
    quick = torch.cuda.is_available() or cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    return torch.bfloat16 if quick else torch.float32


def encode(tokenizer, american: str, british: str) -> dict[str, list[int]]:
    """Return one example whose loss is counted on the answer alone."""
    prompt = tokenizer(PROMPT.format(american))["input_ids"]
    answer = tokenizer(f" {british}", add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def report(when: str, trainer: Trainer, tokenizer, test: list[tuple[str, str]]) -> float:
    """Print and return the loss on the held-out words; print how many are spelled right."""
    loss = trainer.evaluate()["eval_loss"]
    answers = spell(trainer.model, tokenizer, [american for american, _ in test])
    right = sum(answer == british for answer, (_, british) in zip(answers, test, strict=True))
    print(f"\n{when} training: held-out loss {loss:.3f}, {right / len(test):.0%} spelled right")
    for word, answer in zip(NEW_WORDS, spell(trainer.model, tokenizer, NEW_WORDS), strict=True):
        print(f"  {word} -> {answer}")
    return loss


@torch.inference_mode()
def spell(model, tokenizer, words: list[str]) -> list[str]:
    """Return the first line that the model answers to each word, greedily."""
    prompts = [PROMPT.format(word) for word in words]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    model.eval()
    output = model.generate(**batch.to(model.device), max_new_tokens=12, do_sample=False)
    answers = tokenizer.batch_decode(
        output[:, batch.input_ids.shape[1] :], skip_special_tokens=True
    )
    return [answer.strip().split("\n")[0] for answer in answers]


def plot(history: list[dict], before: float, after: float) -> None:
    """Draw the loss of training, and that on the held-out words before and after it."""
    rows = [row for row in history if "loss" in row]
    axes = Figure(figsize=(6, 4)).subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
    axes.plot([0, rows[-1]["step"]], [before, after], "o", label="held out")
    axes.set(xlabel="step", ylabel="loss", title="Learning British spelling")
    axes.legend()
    axes.figure.savefig(OUTPUT / "loss.png", dpi=120)


if __name__ == "__main__":
    main()
