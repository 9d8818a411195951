"""The task of the quickstart, which `qlora.py` and `dpo.py` share: American to British spelling.

Its prompt, its examples, greedy answers, the share of them that is right, and the picture.
"""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, Trainer

PROMPT = "American: {}\nBritish:"
NEW_WORDS = ["tokenization", "quantized", "hyperparameterization", "my favorite color"]
AT_ONCE = 20
"""Words that are answered together, between two steps of the bar."""

Pairs = list[tuple[str, str]]


def fastest_dtype() -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it, else float32."""
    cpu = torch.cpu.get_capabilities()
    quick = torch.cuda.is_available() or cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    return torch.bfloat16 if quick else torch.float32


def for_trainer(tokenizer, train: Pairs, test: Pairs) -> dict[str, Any]:
    """Return the arguments with which a Trainer learns from some words and is judged by others."""
    return {
        "train_dataset": [encode(tokenizer, *pair) for pair in train],
        "eval_dataset": [encode(tokenizer, *pair) for pair in test],
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
    }


def encode(tokenizer, american: str, british: str) -> dict[str, list[int]]:
    """Return one example whose loss is counted on the answer alone."""
    prompt = tokenizer(PROMPT.format(american))["input_ids"]
    answer = tokenizer(f" {british}", add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


@torch.inference_mode()
def spell(model, tokenizer, words: list[str]) -> list[str]:
    """Return the first line that the model answers to each word, greedily."""
    model.eval()
    answers: list[str] = []
    for start in tqdm(range(0, len(words), AT_ONCE), "spelling", leave=False, disable=None):
        prompts = [PROMPT.format(word) for word in words[start : start + AT_ONCE]]
        batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        output = model.generate(**batch.to(model.device), max_new_tokens=12, do_sample=False)
        answers += tokenizer.batch_decode(
            output[:, batch.input_ids.shape[1] :], skip_special_tokens=True
        )
    return [answer.strip().split("\n")[0] for answer in answers]


def score(model, tokenizer, pairs: Pairs) -> float:
    """Return the share of American words whose British spelling the model gives."""
    answers = spell(model, tokenizer, [american for american, _ in pairs])
    right = [answer == british for answer, (_, british) in zip(answers, pairs, strict=True)]
    return sum(right) / len(right)


def report(when: str, trainer: Trainer, tokenizer, test: Pairs) -> float:
    """Print and return the loss on the held-out words; print how many are spelled right."""
    loss = trainer.evaluate()["eval_loss"]
    right = score(trainer.model, tokenizer, test)
    print(f"\n{when} training: held-out loss {loss:.3f}, {right:.0%} spelled right")
    for word, answer in zip(NEW_WORDS, spell(trainer.model, tokenizer, NEW_WORDS), strict=True):
        print(f"  {word} -> {answer}")
    return loss


def plot(history: list[dict], before: float, after: float, file: Path) -> None:
    """Draw the loss of training, and that on the held-out words before and after it."""
    rows = [row for row in history if "loss" in row]
    axes = Figure(figsize=(6, 4)).subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
    axes.plot([0, rows[-1]["step"]], [before, after], "o", label="held out")
    axes.set(xlabel="step", ylabel="loss", title="Learning British spelling")
    axes.legend()
    axes.figure.savefig(file, dpi=120)
