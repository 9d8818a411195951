"""Run by test_trainer_patch.py in a process of its own, where peft cannot be imported."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_lora


def base(folder: Path) -> Any:
    """The same tiny model every time, saved so that an adapter can name it."""
    if not folder.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=48, num_hidden_layers=2, num_key_value_heads=2, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def attempt(adapter: Path) -> Any:
    """What AutoModel makes of an adapter folder, or the name of its error."""
    try:
        return AutoModelForCausalLM.from_pretrained(adapter)
    except Exception as error:
        return type(error).__name__


def kinds(model: Any) -> list[str]:
    """The names of two classes: the model's and that of an adapted layer."""
    return [type(model).__name__, type(model.model.layers[0].self_attn.q_proj).__name__]


def main(folder: Path) -> dict[str, Any]:
    """Save, resume, end with the best, push from a checkpoint, load by the auto class."""
    told: dict[str, Any] = {}
    model = hf_lora.wrap(base(folder / "base"), "q_proj", r=4)
    told["trainer imported by wrap"] = "transformers.trainer" in sys.modules

    from transformers import Trainer, pipeline

    from tests.integrations import training

    told["patched"] = hasattr(Trainer._load_best_model, "__wrapped__")
    scores = iter([0.9, 0.1])
    first = training.trainer(
        model,
        folder / "first",
        eval_dataset=training.tokens(4, seed=8),
        compute_metrics=lambda _: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    first.train()
    checkpoint = folder / "first" / "checkpoint-4"
    told["files"] = sorted(training.files(checkpoint))
    told["best equal"] = training.same(training.in_file_names(model), training.saved(checkpoint))
    torch.manual_seed(5)
    other = hf_lora.wrap(base(folder / "base"), "q_proj", r=4)
    second = training.trainer(other, folder / "second")
    second.train(resume_from_checkpoint=str(checkpoint))
    last = training.saved(folder / "first" / "checkpoint-8")
    told["resumed equal"] = training.same(training.in_file_names(other), last)

    # nothing leaves this machine: the original method, which would push, ends at once here
    second.args.hub_strategy = "every_save"
    second._finish_current_push()
    hf_lora.integrations.trainer.hooks.push_from_checkpoint(
        lambda checkpoint: None, second, str(checkpoint)
    )
    told["pushed from"] = sorted(path.name for path in (folder / "second").glob("adapter_*"))

    told["auto before"] = attempt(checkpoint)
    hf_lora.enable_auto()
    loaded = attempt(checkpoint)
    told["auto"] = kinds(loaded)
    tensors = training.in_file_names(loaded)
    told["auto equal"] = training.same(tensors, training.saved(checkpoint))
    made = pipeline("text-generation", model=str(checkpoint), tokenizer=training.tokenizer())
    told["pipeline"] = kinds(made.model)
    hf_lora.disable_auto()
    told["auto after"] = attempt(checkpoint)
    told["peft"] = [n for n, m in sys.modules.items() if n.split(".")[0] == "peft" and m]
    return told
