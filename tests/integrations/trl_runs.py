"""What the tests of TRL's trainers share: data of a few words, and a short run."""

import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from tests.integrations import training

PREFERENCES = {
    "prompt": ["the cat", "a dog"] * 4,
    "chosen": [" sat on mat", " ran"] * 4,
    "rejected": [" ran", " sat on the big mat"] * 4,
}
COMPLETIONS = {
    "prompt": PREFERENCES["prompt"],
    "completion": PREFERENCES["chosen"],
    "label": [True, False] * 4,
}
PROMPTS = {"prompt": PREFERENCES["prompt"]}
SENTENCES = {"text": ["the cat sat on the mat", "a big dog ran"] * 4}


def small(seed: int = 0) -> Any:
    """A tiny Llama that knows the tokenizer's words."""
    return training.llama(
        seed,
        vocab_size=len(training.WORDS),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )


def make(cls: Any, config: Any, model: Any, folder: Path, data: dict, **given: Any) -> Any:
    """A trainer of TRL's with the arguments that all of them take; ``args`` are its config's."""
    fields = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "logging_steps": 1,
        **given.pop("args", {}),
    }
    training.speed_up_collection()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return cls(
            model=model,
            args=config(**fields),
            train_dataset=Dataset.from_dict(data),
            processing_class=training.tokenizer(),
            **given,
        )


def reward(completions: list[str], **_: Any) -> list[float]:
    """Something that differs between completions, so that there is an advantage."""
    return [completion.count("a") - 0.1 * len(completion) for completion in completions]


def storages(model: torch.nn.Module) -> dict[str, int]:
    """Where the data of each of the model's parameters lies."""
    return {name: p.data_ptr() for name, p in model.named_parameters()}
