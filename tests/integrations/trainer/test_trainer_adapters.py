"""Checkpoints of models with several adapters, with modules trained in full, of other libraries."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import hf_lora
from tests.integrations import training
from tests.integrations.training import CHECKPOINT, adapter_tensors, base_tensors, run, same


class TestSeveralAdapters:
    def make(self, seed: int) -> Any:
        model = training.wrapped(seed=seed)
        hf_lora.add_adapter(model, "fr", targets=["q_proj", "o_proj"], r=2, trainable=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_fr"):
                    parameter.normal_()
        return hf_lora.activate(model, ["default", "fr"])

    def test_the_trained_and_the_frozen_one_are_saved_and_restored(self, tmp_path: Path):
        model = self.make(seed=1)
        frozen = training.in_file_names(model, "fr")
        first = run(tmp_path / "first", model=model)
        checkpoint = first.folder / "checkpoint-4"
        names = {"adapter_config.json", "adapter_model.safetensors"}
        assert training.files(checkpoint) == CHECKPOINT | {f"fr/{name}" for name in names}
        assert same(training.saved(checkpoint / "fr"), frozen)
        assert same(training.in_file_names(model, "fr"), frozen)

        other = self.make(seed=2)
        assert not same(training.in_file_names(other, "fr"), frozen)
        second = run(tmp_path / "second", str(checkpoint), model=other)
        assert same(training.in_file_names(other, "fr"), frozen)
        assert same(adapter_tensors(second.model), adapter_tensors(first.model))

    def test_one_that_is_not_called_default(self, tmp_path: Path):
        first = run(tmp_path / "first", model=training.wrapped(adapter="fr"))
        checkpoint = first.folder / "checkpoint-4"
        assert (checkpoint / "fr" / "adapter_model.safetensors").is_file()
        assert not (checkpoint / "adapter_model.safetensors").exists()
        second = run(
            tmp_path / "second", str(checkpoint), model=training.wrapped(seed=4, adapter="fr")
        )
        assert same(adapter_tensors(second.model), adapter_tensors(first.model))


class TestModulesTrainedInFull:
    def make(self, seed: int) -> Any:
        return training.wrapped(seed=seed, train=["lm_head", r"layers\.1\.input_layernorm"])

    def test_they_are_in_the_checkpoint_and_restored_exactly(self, tmp_path: Path):
        first = run(tmp_path / "first", model=self.make(seed=1))
        checkpoint = first.folder / "checkpoint-4"
        keys = set(training.saved(checkpoint))
        full = {
            "base_model.model.lm_head.weight",
            "base_model.model.model.layers.1.input_layernorm.weight",
        }
        assert {key for key in keys if "lora_" not in key} == full
        second = self.make(seed=2)
        with torch.no_grad():
            second.lm_head.weight.add_(1.0)
        run(tmp_path / "second", str(checkpoint), model=second)
        assert same(adapter_tensors(second), adapter_tensors(first.model))
        assert same(base_tensors(first.model), first.base_before)
        trained = first.model.lm_head.weight
        assert not torch.equal(trained, first.base_before["lm_head.weight"])


def test_a_wrapped_module_of_another_library_keeps_trainers_own_checkpoints(tmp_path: Path):
    """Its class has no save_pretrained, so Trainer saves its state dict, base and all."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(training.VOCABULARY, 8)
            self.out = nn.Linear(8, 3)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict:
            logits = self.out(self.embed(input_ids).mean(1))
            loss = nn.functional.cross_entropy(logits, labels[:, 0] % 3)
            return {"loss": loss, "logits": logits}

    def make(seed: int) -> Any:
        torch.manual_seed(0)
        model = Classifier()
        torch.manual_seed(seed)
        return hf_lora.wrap(model, "out", r=2)

    first = run(tmp_path / "first", model=make(1))
    checkpoint = first.folder / "checkpoint-4"
    assert load_file(checkpoint / "model.safetensors").keys() == first.model.state_dict().keys()
    second = run(tmp_path / "second", str(checkpoint), model=make(2))
    assert same(adapter_tensors(second.model), adapter_tensors(first.model))
