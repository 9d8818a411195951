"""Biases that train go through the plain Trainer: saved, without decay, resumed to the bit."""

from pathlib import Path
from typing import Any

import torch

from tests.integrations import training
from tests.integrations.training import adapter_tensors, base_tensors, run, same

BIASES: dict[str, Any] = {
    "fields": {"attention_bias": True, "mlp_bias": True},
    "bias": "all",
    "lora_bias": True,
}
STEPS = {"max_steps": 4, "save_steps": 2}


def test_a_training_resumes_to_the_bit(tmp_path: Path):
    whole = run(tmp_path, model=training.wrapped(**BIASES), **STEPS)
    assert same(base_tensors(whole.model), whole.base_before)
    trained = adapter_tensors(whole.model)
    start = adapter_tensors(training.wrapped(**BIASES))
    biases = [name for name in trained if "bias" in name]
    assert len(biases) == 2 * 7 + 6
    assert not any(torch.equal(trained[name], start[name]) for name in biases)
    other = training.wrapped(seed=9, **BIASES)
    again = run(tmp_path, str(tmp_path / "checkpoint-2"), model=other, **STEPS)
    assert same(adapter_tensors(again.model), trained)


def test_trainers_own_optimizer_lets_no_bias_decay(tmp_path: Path):
    made = training.trainer(training.wrapped(**BIASES), tmp_path, weight_decay=0.1)
    decays = {id(p) for g in made.create_optimizer().param_groups for p in g["params"]
              if g["weight_decay"]}  # fmt: skip
    for name, parameter in made.model.named_parameters():
        if parameter.requires_grad:
            assert (id(parameter) in decays) == ("bias" not in name), name
