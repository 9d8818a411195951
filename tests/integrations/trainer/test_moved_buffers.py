"""Buffers that a training moves, through Trainer's checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import PeftModel
from safetensors import safe_open
from torch import nn

import hf_lora
from tests.integrations.training import seeded, tokens, trainer
from tests.layers.test_statistics import mobilevit
from tests.model.test_buffers import moved
from tests.moving import Running, answer, around, balance, balanced, mixture_of_experts
from tests.snapshot import base_digests

WEIGHTS = "adapter_model.safetensors"
EVEN: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_steps": 0}
"""So that a run which is to be shorter takes the same steps."""


def header(folder: Path) -> dict[str, Any]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return json.loads(file.metadata()["hf_lora"])


class Balancing(hf.TrainerCallback):
    """Moves the routers' biases after each step, as DeepSeek-V3's training does."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        balance(others["model"])


def experts(folder: Path, steps: int, resume: bool = False, **fields: Any) -> nn.Module:
    model = hf_lora.wrap(mixture_of_experts(), ["q_b_proj", "o_proj"], r=2, dropout=0.1)
    run = trainer(model, folder, callbacks=[Balancing()], max_steps=steps, **EVEN, **fields)
    run.train(resume_from_checkpoint=resume)
    return model


def test_a_router_is_balanced_through_an_interruption_as_without_one(tmp_path: Path):
    base = base_digests(mixture_of_experts())
    through = experts(tmp_path / "through", 8)
    experts(tmp_path / "resumed", 4)
    resumed = experts(tmp_path / "resumed", 8, resume=True)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = through.get_buffer(name)
    assert torch.equal(bias, balanced(8))
    assert torch.equal(resumed.get_buffer(name), bias)
    end = [
        folder / "checkpoint-8" / WEIGHTS for folder in (tmp_path / "through", tmp_path / "resumed")
    ]
    assert end[0].read_bytes() == end[1].read_bytes()
    for model in (through, resumed):
        with hf_lora.no_adapter(model):
            assert not model.get_buffer(name).any()
        hf_lora.unwrap(model)
        assert base_digests(model) == base
    loaded = hf_lora.load(mixture_of_experts(), tmp_path / "through" / "checkpoint-8")
    assert torch.equal(loaded.get_buffer(name), bias)
    theirs = PeftModel.from_pretrained(mixture_of_experts(), tmp_path / "through" / "checkpoint-8")
    assert torch.equal(theirs.base_model.model.get_buffer(name), bias)


def test_the_best_model_at_the_end_has_the_bias_that_it_had(tmp_path: Path):
    def worse(predicted: Any) -> dict[str, float]:
        worse.calls = getattr(worse, "calls", 0) + 1
        return {"rating": -float(worse.calls)}

    model = experts(
        tmp_path,
        6,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        eval_dataset=tokens(4),
        compute_metrics=worse,
        metric_for_best_model="rating",
        load_best_model_at_end=True,
    )
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(model.get_buffer(name), balanced(2))


def images(folder: Path, steps: int, resume: bool = False) -> nn.Module:
    with seeded(3):
        model = hf_lora.wrap(mobilevit(), "query|value", r=2, train=[r"conv_1x1_exp"])
    generator = torch.Generator().manual_seed(4)
    rows = [
        {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 2}
        for index in range(16)
    ]
    run = trainer(model, folder, train_dataset=rows, max_steps=steps, **EVEN)
    run.train(resume_from_checkpoint=resume)
    return model


def test_a_normalization_that_is_trained_in_full_resumes_to_the_bit(tmp_path: Path):
    through = images(tmp_path / "through", 8)
    images(tmp_path / "resumed", 4)
    resumed = images(tmp_path / "resumed", 8, resume=True)
    norm = through.mobilevit.conv_1x1_exp.normalization
    assert norm.num_batches_tracked == 16  # two forwards a step
    end = [
        folder / "checkpoint-8" / WEIGHTS for folder in (tmp_path / "through", tmp_path / "resumed")
    ]
    assert end[0].read_bytes() == end[1].read_bytes()
    inputs = torch.randn(1, 3, 32, 32)
    assert torch.equal(through.eval()(inputs).logits, resumed.eval()(inputs).logits)
    frozen = through.mobilevit.conv_stem.normalization
    assert not frozen.num_batches_tracked


class Regression(nn.Module):
    """Somebody's own model, of which Trainer saves the whole state dict."""

    def __init__(self):
        super().__init__()
        self.net = around(Running)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.net(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def own(folder: Path, steps: int, resume: bool = False) -> Any:
    with seeded(5):
        model = hf_lora.wrap(Regression(), "fc", r=2)
    generator = torch.Generator().manual_seed(6)
    rows = [{"x": torch.randn(6, generator=generator), "labels": torch.ones(3)} for _ in range(16)]
    run = trainer(model, folder, train_dataset=rows, max_steps=steps, **EVEN)
    run.train(resume_from_checkpoint=resume)
    return model


def test_a_model_of_ones_own_resumes_to_the_bit(tmp_path: Path):
    through = own(tmp_path / "through", 8)
    own(tmp_path / "resumed", 4)
    resumed = own(tmp_path / "resumed", 8, resume=True)
    assert through.net.inner.steps == 16
    assert moved(through) == moved(resumed) == {"net.inner.mean", "net.inner.steps"}
    assert torch.equal(answer(through.net), answer(resumed.net))
    with hf_lora.no_adapter(resumed):
        assert torch.equal(answer(resumed.net), answer(around(Running)))


def test_a_part_of_a_model_that_trains_as_a_whole(tmp_path: Path):
    outer = mixture_of_experts()
    outer.lm_head.requires_grad_(False)
    hf_lora.wrap(outer.model, ["q_b_proj", "o_proj"], r=2)
    run = trainer(outer, tmp_path, callbacks=[Balancing()], max_steps=2, save_steps=2, **EVEN)
    run.train()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert header(tmp_path / "checkpoint-2")["buffers"] == [name]
    again = hf_lora.load(mixture_of_experts(), tmp_path / "checkpoint-2")
    assert torch.equal(again.get_buffer(name), outer.get_buffer(name))
    resumed = mixture_of_experts()
    resumed.lm_head.requires_grad_(False)
    hf_lora.wrap(resumed.model, ["q_b_proj", "o_proj"], r=2)
    run = trainer(resumed, tmp_path, callbacks=[Balancing()], max_steps=3, **EVEN)
    run.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.get_buffer(name), balanced(3))
