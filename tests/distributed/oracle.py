"""PEFT as the judge of what several processes have saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

import hf_lora
from tests.integrations import training


def assert_peft_reads(folder: Path, logits: Callable[[Any], torch.Tensor]) -> None:
    """Check that PEFT and hf_lora load an adapter with equal outputs, which are not the base's."""
    theirs = logits(peft.PeftModel.from_pretrained(training.llama(), folder))
    ours = logits(hf_lora.load(training.llama(), folder))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, logits(training.llama()), atol=1e-3)
