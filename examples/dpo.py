"""Preferences with TRL's DPOTrainer, and a reference model that costs no memory.

    python examples/dpo.py            # needs trl; a CPU will do
    python examples/dpo.py --quick    # fewer steps

Of each pair of spellings the British one is preferred to the American one. DPO needs the model as
it was before training as a reference: the trainer gets it by itself, made of the same tensors.
"""

import argparse

import assets
import torch
from datasets import Dataset
from spelling import PROMPT, fastest_dtype
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

import hf_lora

OUTPUT = "outputs/dpo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, fewer tests")
    args = parser.parse_args()
    train, test = assets.spellings(held_out=25 if args.quick else 200)
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=fastest_dtype())
    model = hf_lora.wrap(model, targets="all-linear", r=16)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            OUTPUT,
            max_steps=6 if args.quick else 60,
            per_device_train_batch_size=8,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list([preference(*pair) for pair in train]),
        processing_class=tokenizer,
    )
    mine = {tensor.data_ptr() for tensor in model.parameters()}
    own = sum(p.nbytes for p in trainer.ref_model.parameters() if p.data_ptr() not in mine)
    print(f"the reference model has {own} bytes of weights of its own")
    before = prefers_british(model, tokenizer, test)
    trainer.train()
    after = prefers_british(model, tokenizer, test)
    print(f"\nthe British spelling is likelier: {before:.0%} before, {after:.0%} after training")
    model.save_pretrained(f"{OUTPUT}/adapter")


def preference(american: str, british: str) -> dict[str, str]:
    """Return one pair of answers to the same prompt."""
    prompt = PROMPT.format(american)
    return {"prompt": prompt, "chosen": f" {british}", "rejected": f" {american}"}


def prefers_british(model, tokenizer, pairs: list[tuple[str, str]]) -> float:
    """Return the share of words of which the British spelling is the likelier answer."""
    british = log_likelihoods(model, tokenizer, pairs)
    american = log_likelihoods(model, tokenizer, [(american, american) for american, _ in pairs])
    return (british > american).float().mean().item()


@torch.inference_mode()
def log_likelihoods(model, tokenizer, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """Return the log-likelihood of each (word, answer)'s answer and of its end."""
    prompts = [PROMPT.format(word) for word, _ in pairs]
    texts = [f"{p} {pair[1]}{tokenizer.eos_token}" for p, pair in zip(prompts, pairs, strict=True)]
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    starts = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    targets = batch.input_ids[:, 1:]
    positions = torch.arange(1, batch.input_ids.shape[1], device=model.device)
    counted = batch.attention_mask[:, 1:].bool()
    counted &= positions >= torch.tensor(starts, device=model.device)[:, None]
    logits = model.eval()(**batch).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    return -(losses * counted).sum(-1)


if __name__ == "__main__":
    main()
