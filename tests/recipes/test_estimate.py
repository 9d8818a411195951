"""What is foreseen of a training: told in time, and about as large as what is kept."""

import warnings
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from hf_lora.errors import HfLoRAWarning
from hf_lora.recipes import estimate
from hf_lora.recipes.estimate import faster_type, step_bytes, warn_if_slow
from tests.tiny_base import tiny_model


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """Operations in a second, by type, on a machine that is not there."""
    found = {torch.float32: 100e9, torch.bfloat16: 1e9, torch.float16: 90e9}
    monkeypatch.setattr(estimate, "operations_per_second", found.__getitem__)
    return found


def test_a_type_that_is_slow_here_is_told(speeds: dict[torch.dtype, float]):
    with pytest.warns(HfLoRAWarning, match="^bfloat16 is slow on this machine: take float32$"):
        warn_if_slow(torch.bfloat16, "take {}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float16, torch.float32):
            warn_if_slow(dtype, "take {}")
    speeds[torch.bfloat16] = 400e9
    assert faster_type(torch.bfloat16) is None


def test_what_a_step_keeps_is_of_the_size_of_what_is_foreseen():
    """Within a factor of two of what autograd holds for backward, logits left aside."""
    model = tiny_model(vocab_size=16, num_hidden_layers=4, hidden_size=64, intermediate_size=192)
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    held: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(1, 128, dtype=torch.long)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids).logits.sum()
    kept = sum(size for place, size in held.items() if place not in mine)
    foreseen = step_bytes(model.config, 128, 4) - 128 * 16 * 12
    assert foreseen / 2 < kept < foreseen * 2


def test_checkpointing_keeps_one_block_and_its_inputs():
    config = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=32)
    assert step_bytes(config, 128, 2, checkpointing=True) < step_bytes(config, 128, 2)
