"""TRL's SFTTrainer on a wrapped model, with nothing extra."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig, SFTTrainer

import hf_lora
from hf_lora.errors import GradientError, HfLoRAWarning
from tests.integrations import training
from tests.integrations.training import CHECKPOINT, adapter_tensors, base_tensors, same
from tests.integrations.trl_runs import SENTENCES, make, small

WITH_TOKENIZER = CHECKPOINT | {"tokenizer.json", "tokenizer_config.json"}


def wrapped(seed: int = 1, **fields: Any) -> Any:
    fields = {"targets": ["q_proj", "v_proj"], "r": 4, "dropout": 0.1, **fields}
    model = small()
    with training.seeded(seed):
        return hf_lora.wrap(model, **fields)


def sft(model: Any, folder: Path, **args: Any) -> SFTTrainer:
    return make(SFTTrainer, SFTConfig, model, folder, SENTENCES, args=args)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SFTTrainer:
    trainer = sft(wrapped(), tmp_path_factory.mktemp("sft"))
    trainer.train()
    return trainer


class TestCheckpoints:
    def test_they_hold_the_adapter_alone(self, finished: SFTTrainer):
        folder = Path(str(finished.args.output_dir))
        assert training.checkpoints(folder) == ["checkpoint-2", "checkpoint-4"]
        assert training.files(folder / "checkpoint-2") == WITH_TOKENIZER
        last = training.saved(folder / "checkpoint-4")
        assert same(last, training.in_file_names(finished.model))
        assert len(last) == 8

    def test_the_base_was_not_written_and_the_adapter_was(self, finished: SFTTrainer):
        start = wrapped()
        assert same(base_tensors(finished.model), base_tensors(start))
        ours, end = adapter_tensors(start), adapter_tensors(finished.model)
        assert all(not torch.equal(ours[key], end[key]) for key in ours)

    def test_the_card_is_ours_with_the_tags_of_trl(self, finished: SFTTrainer):
        """TRL writes a card of its own with every checkpoint."""
        card = (Path(str(finished.args.output_dir)) / "README.md").read_text()
        assert "library_name: peft" in card
        assert "- sft" in card
        assert "- trl" in card

    def test_a_resumed_run_is_equal(self, finished: SFTTrainer, tmp_path: Path):
        folder = Path(str(finished.args.output_dir))
        resumed = sft(wrapped(seed=9), tmp_path)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert same(adapter_tensors(resumed.model), adapter_tensors(finished.model))

    def test_a_model_that_is_not_ours_keeps_trls_card(self, tmp_path: Path):
        trainer = sft(small(), tmp_path, max_steps=1, save_steps=1)
        trainer.train()
        card = (tmp_path / "README.md").read_text()
        assert "library_name: transformers" in card
        assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


class TestFusedHead:
    """TRL multiplies by ``lm_head.weight`` and never calls the layer: LoRA there stays as it is."""

    def test_the_head_among_others_is_named(self, tmp_path: Path):
        model = wrapped(targets=["q_proj", "lm_head"])
        before = adapter_tensors(model)
        with pytest.warns(HfLoRAWarning) as caught:
            sft(model, tmp_path, max_steps=2).train()
        (warning,) = [w for w in caught if issubclass(w.category, HfLoRAWarning)]
        for name in ("lm_head.lora_A", "lm_head.lora_B"):
            assert f"{name} (the output head: a fused loss" in str(warning.message)
        assert "q_proj" not in str(warning.message)
        after = adapter_tensors(model)
        changed = {key for key in after if not torch.equal(before[key], after[key])}
        assert changed == {key for key in after if "lm_head" not in key}

    def test_the_head_alone_is_an_error(self, tmp_path: Path):
        with pytest.raises(GradientError, match="the output head: a fused loss"):
            sft(wrapped(targets=["lm_head"]), tmp_path).train()

    def test_the_head_trained_in_full_is_trained(self, tmp_path: Path):
        """As the message advises: reading its weight gives the adapter's copy."""
        model = wrapped(train=["lm_head"])
        start, base = model.lm_head.weight.detach().clone(), base_tensors(model)
        sft(model, tmp_path, max_steps=2, save_steps=2).train()
        assert not torch.equal(model.lm_head.weight, start)
        assert same(base_tensors(model), base)
        saved = training.saved(tmp_path / "checkpoint-2")
        assert torch.equal(saved["base_model.model.lm_head.weight"], model.lm_head.weight)
