"""One adapter written by PEFT and read by us, and the other way round."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import hf_lora
from tests.oracle.adapting import PLAIN, TOLERANCE, distance, logits, scramble
from tests.oracle.architectures import ARCHITECTURES, Architecture

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
LLAMA, GPT2, BERT = BY_NAME["llama"], BY_NAME["gpt2"], BY_NAME["bert"]


# What PEFT warns about (tied weights, patterns without effect) is meant; ours stay errors.
quiet = pytest.mark.filterwarnings("ignore:::peft")


def pefts(
    folder: Path,
    architecture: Architecture = LLAMA,
    build: Callable[[], nn.Module] | None = None,
    adapter: str = "default",
    **fields: Any,
) -> torch.Tensor:
    """Save an adapter with PEFT and return what the model answers with it."""
    model = (build or architecture.build)()
    plain = logits(model, architecture.inputs())
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6} | fields)
    model = peft.get_peft_model(model, config, adapter_name=adapter).eval()
    scramble(model)
    model.save_pretrained(folder)
    found = logits(model, architecture.inputs())
    assert distance(found, plain) > PLAIN
    return found


def ours_answers(
    folder: Path, architecture: Architecture = LLAMA, build: Any = None
) -> torch.Tensor:
    model = hf_lora.load((build or architecture.build)(), folder)
    return logits(model, architecture.inputs())


def peft_answers(
    folder: Path, architecture: Architecture = LLAMA, build: Any = None
) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained((build or architecture.build)(), folder).eval()
    return logits(model, architecture.inputs())


def both_ways(folder: Path, expected: torch.Tensor, architecture: Architecture, build=None) -> None:
    """PEFT's file in ours; then saved by us, and that in PEFT, under another base."""
    build = build or architecture.build
    model = hf_lora.load(build(), folder)
    assert distance(logits(model, architecture.inputs()), expected) < TOLERANCE
    hf_lora.save(model, folder / "again")
    assert distance(peft_answers(folder / "again", architecture, build), expected) < TOLERANCE
    assert torch.equal(
        ours_answers(folder / "again", architecture, build), logits(model, architecture.inputs())
    )
