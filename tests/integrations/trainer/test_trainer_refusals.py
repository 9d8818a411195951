"""Checkpoints that do not fit the model, and damaged ones: one error, and the model as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import hf_lora
from hf_lora.errors import AdapterFileError, AdapterMismatchError, StateError
from tests.integrations import training
from tests.integrations.training import adapter_tensors, base_tensors, run, same


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(folder, max_steps=2, save_steps=2)
    return folder / "checkpoint-2"


def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-2"))


class TestResumeIsRefused:
    """One error that names the checkpoint and the fault; the model as it was."""

    def attempt(self, model: Any, checkpoint: Path, folder: Path, error: type[Exception]) -> str:
        adapters, base = adapter_tensors(model), base_tensors(model)
        trainer = training.trainer(model, folder)
        with pytest.raises(error) as caught:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert same(adapter_tensors(model), adapters)
        assert same(base_tensors(model), base)
        assert str(checkpoint) in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            ({"r": 8}, "q_proj: the model has LayerConfig(r=8"),
            ({"alpha": 7.0}, "alpha=7.0"),
            ({"targets": ["q_proj", "v_proj"]}, "down_proj: the model has None"),
            ({"targets": ["q_proj", "v_proj", "down_proj", "o_proj"]}, "o_proj: the model has"),
            ({"train": ["lm_head"]}, "trained in full"),
        ],
    )
    def test_other_ranks_or_targets(
        self, checkpoint: Path, tmp_path: Path, other: dict, words: str
    ):
        message = self.attempt(
            training.wrapped(**other), checkpoint, tmp_path, AdapterMismatchError
        )
        assert words in message

    def test_another_base(self, checkpoint: Path, tmp_path: Path):
        model = training.wrapped(base_seed=5)
        self.attempt(model, checkpoint, tmp_path, hf_lora.BaseMismatchError)

    def test_another_adapter(self, checkpoint: Path, tmp_path: Path):
        model = training.wrapped()
        hf_lora.add_adapter(model, "fr", targets="q_proj", r=2)
        message = self.attempt(model, checkpoint, tmp_path, AdapterMismatchError)
        assert "holds default, and this model has default, fr" in message

    def test_a_full_checkpoint(self, tmp_path: Path):
        trainer = training.trainer(training.llama(), tmp_path, max_steps=1, save_steps=1)
        trainer.train()
        message = self.attempt(
            training.wrapped(), tmp_path / "checkpoint-1", tmp_path, AdapterMismatchError
        )
        assert "holds no adapter" in message

    def test_no_such_folder(self, tmp_path: Path):
        missing = tmp_path / "checkpoint-77"
        message = self.attempt(training.wrapped(), missing, tmp_path, AdapterMismatchError)
        assert "not a folder" in message

    def test_a_truncated_file(self, checkpoint: Path, tmp_path: Path):
        copy = damaged(checkpoint, tmp_path)
        weights = copy / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.attempt(training.wrapped(), copy, tmp_path, AdapterFileError)

    def test_a_flipped_bit(self, checkpoint: Path, tmp_path: Path):
        copy = damaged(checkpoint, tmp_path)
        weights = copy / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-17] ^= 1
        weights.write_bytes(content)
        self.attempt(training.wrapped(), copy, tmp_path, AdapterFileError)

    def test_a_config_that_says_otherwise(self, checkpoint: Path, tmp_path: Path):
        copy = damaged(checkpoint, tmp_path)
        config = copy / "adapter_config.json"
        fields = json.loads(config.read_text())
        config.write_text(json.dumps({**fields, "lora_alpha": 99}))
        self.attempt(training.wrapped(), copy, tmp_path, AdapterFileError)

    def test_the_second_of_two_adapters_is_damaged(self, tmp_path: Path):
        model = training.wrapped()
        hf_lora.add_adapter(model, "fr", targets="q_proj", r=2, trainable=False)
        run(tmp_path, model=model, max_steps=1, save_steps=1)
        weights = tmp_path / "checkpoint-1" / "fr" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        fresh = training.wrapped(seed=3)
        hf_lora.add_adapter(fresh, "fr", targets="q_proj", r=2, trainable=False)
        self.attempt(fresh, tmp_path / "checkpoint-1", tmp_path, AdapterFileError)

    def test_a_merged_model(self, checkpoint: Path, tmp_path: Path):
        model = training.wrapped()
        hf_lora.merge(model)
        trainer = training.trainer(model, tmp_path)
        with pytest.raises(StateError, match="Cannot train while default is merged"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
