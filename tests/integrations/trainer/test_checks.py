"""Runs that would change nothing are errors, before they start or at their first step."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import hf_lora
from hf_lora.errors import GradientError, HfLoRAWarning, StateError
from tests.integrations import training
from tests.integrations.training import adapter_tensors, same


def train(model: Any, folder: Path, **fields: Any) -> Any:
    trainer = training.trainer(model, folder, max_steps=1, **fields)
    trainer.train()
    return trainer


def refused(model: Any, folder: Path, error: type[Exception], **fields: Any) -> str:
    before = adapter_tensors(model)
    with pytest.raises(error) as caught:
        train(model, folder, **fields)
    after = adapter_tensors(model)
    assert same({key: after[key] for key in before}, before)
    return str(caught.value)


class TestBeforeTheRun:
    def test_a_loaded_adapter_is_frozen_unless_asked(self, tmp_path: Path):
        training.wrapped().save_pretrained(tmp_path / "adapter")
        model = hf_lora.load(training.llama(), tmp_path / "adapter")
        message = refused(model, tmp_path, GradientError)
        assert "'default' is active and frozen" in message
        assert "hf_lora.unfreeze(model, name), load with trainable=True" in message
        train(hf_lora.unfreeze(model, "default"), tmp_path)

    def test_the_trainable_one_is_not_active(self, tmp_path: Path):
        model = training.wrapped()
        hf_lora.add_adapter(model, "fr", targets="q_proj", r=2)
        hf_lora.freeze(model, "default")
        message = refused(model, tmp_path, GradientError)
        assert "'default' is active and frozen" in message
        assert "'fr' is not active and trainable" in message

    def test_no_adapter_is_active(self, tmp_path: Path):
        model = hf_lora.activate(training.wrapped(), ())
        assert "'default' is not active and trainable" in refused(model, tmp_path, GradientError)

    def test_a_merged_model(self, tmp_path: Path):
        model = hf_lora.merge(training.wrapped())
        assert "Cannot train while default is merged" in refused(model, tmp_path, StateError)

    def test_an_adapter_at_another_strength_than_it_is_saved_with(self, tmp_path: Path):
        model = hf_lora.activate(training.wrapped(), {"default": 0.5})
        with pytest.warns(HfLoRAWarning, match="default: 0.5"):
            train(model, tmp_path)

    def test_a_part_of_the_base_that_the_user_unfroze_may_train_alone(self, tmp_path: Path):
        model = hf_lora.freeze(training.wrapped(), "default")
        model.model.norm.weight.requires_grad_(True)
        before = model.model.norm.weight.detach().clone()
        train(model, tmp_path, warmup_steps=0)
        assert not torch.equal(model.model.norm.weight, before)


class Detached(Trainer):
    """A loss that depends on the adapters' outputs no longer."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().compute_loss(model, inputs, *args, **kwargs).detach()


class OtherLoss(Trainer):
    """A loss of something that trains, but of no adapter."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return model.model.norm.weight.square().sum()


class FirstLayer(Trainer):
    """A loss of the first layer's output: the second layer's adapters have no part in it."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        states = model(inputs["input_ids"], output_hidden_states=True).hidden_states
        return states[1].square().mean()


class TestAtTheFirstStep:
    def test_a_loss_without_a_graph(self, tmp_path: Path):
        message = refused(training.wrapped(), tmp_path, GradientError, cls=Detached)
        assert "No adapter tensor received a gradient" in message
        assert "model.layers.0.self_attn.q_proj.lora_A" in message
        assert "forward ran under torch.no_grad" in message

    def test_a_loss_of_other_parameters(self, tmp_path: Path):
        model = training.wrapped()
        model.model.norm.weight.requires_grad_(True)
        message = refused(model, tmp_path, GradientError, cls=OtherLoss)
        assert message.count("lora_A") + message.count("lora_B") == 12

    def test_some_without_gradient_are_named(self, tmp_path: Path):
        with pytest.warns(HfLoRAWarning) as caught:
            train(training.wrapped(), tmp_path, cls=FirstLayer)
        (warning,) = [w for w in caught if issubclass(w.category, HfLoRAWarning)]
        lines = [line for line in str(warning.message).splitlines() if line.startswith("  - ")]
        assert len(lines) == 6
        assert all("model.layers.1." in line for line in lines)

    def test_it_warns_once_a_run(self, tmp_path: Path):
        trainer = training.trainer(training.wrapped(), tmp_path, cls=FirstLayer, max_steps=3)
        for _ in range(2):
            with pytest.warns(HfLoRAWarning) as caught:
                trainer.train()
            assert sum(issubclass(w.category, HfLoRAWarning) for w in caught) == 1

    def test_an_adapter_that_is_trainable_but_not_active(self, tmp_path: Path):
        model = training.wrapped()
        hf_lora.add_adapter(model, "fr", targets="q_proj", r=2)
        with pytest.warns(HfLoRAWarning, match="all 4 of 'fr': it is not active"):
            train(model, tmp_path)

    def test_a_sound_run_says_nothing(self, tmp_path: Path):
        with warnings.catch_warnings():
            warnings.simplefilter("error", HfLoRAWarning)
            train(training.wrapped(), tmp_path)

    def test_another_error_of_the_run_stays_what_it_is(self, tmp_path: Path):
        class Broken(Trainer):
            def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                raise RuntimeError("something else")

        with pytest.raises(RuntimeError, match=r"^something else$"):
            train(training.wrapped(), tmp_path, cls=Broken)
