"""How hf_lora reaches Trainer, and that it leaves alone what is not ours."""

import gc
import importlib
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers.trainer
from transformers import Trainer

import hf_lora
from hf_lora.errors import HfLoRAWarning
from hf_lora.integrations.trainer import patch as trainer_patch
from hf_lora.integrations.trainer.callback import GradientCheck
from hf_lora.integrations.trainer.hooks import restore_checkpoint
from tests import forked
from tests.integrations import training
from tests.integrations.training import CHECKPOINT, adapter_tensors, run, same

PATCHED = ("train", "create_model_card", "_load_from_checkpoint", "_load_best_model")


def patched(name: str) -> bool:
    return vars(Trainer)[name].__module__ == "transformers.trainer" and hasattr(
        vars(Trainer)[name], "__wrapped__"
    )


@pytest.fixture
def no_patch() -> Iterator[None]:
    """Trainer as transformers made it, until the end of the test."""
    trainer_patch.disable()
    yield
    trainer_patch.enable()


class TestInstalling:
    def test_wrapping_a_model_patches_once(self):
        training.wrapped()
        methods = [vars(Trainer)[name] for name in PATCHED]
        assert all(map(patched, PATCHED))
        training.wrapped()
        assert [vars(Trainer)[name] for name in PATCHED] == methods
        assert not any(hasattr(method.__wrapped__, "__wrapped__") for method in methods)

    def test_it_can_be_refused(self, no_patch: None):
        training.wrapped()
        assert not any(map(patched, PATCHED))

    def test_a_reloaded_module_is_patched_again(self, monkeypatch: pytest.MonkeyPatch):
        training.wrapped()
        for name, value in list(vars(transformers.trainer).items()):
            monkeypatch.setattr(transformers.trainer, name, value)  # undone afterwards
        reloaded = importlib.reload(transformers.trainer)
        assert reloaded.Trainer is not Trainer
        assert hasattr(vars(reloaded.Trainer)["_load_best_model"], "__wrapped__")

    def test_a_trainer_of_another_shape_is_a_warning_not_an_end(self):
        class Other:
            def train(self) -> str:
                return "trained"

        module = types.ModuleType("transformers.trainer")
        module.Trainer = Other  # type: ignore[attr-defined]
        with pytest.warns(HfLoRAWarning, match="has no create_model_card, _load_from_checkpoint"):
            trainer_patch._patch(module)

    def test_other_peoples_trainers_get_no_callback(self, tmp_path: Path):
        training.wrapped()
        trainer = training.trainer(training.llama(), tmp_path, max_steps=1)
        trainer.train()
        assert not any(isinstance(c, GradientCheck) for c in trainer.callback_handler.callbacks)


def test_a_trainer_made_before_the_model_was_wrapped(tmp_path: Path):
    model = training.llama()
    trainer = training.trainer(model, tmp_path)
    with training.seeded(1):
        hf_lora.wrap(model, targets=["q_proj", "v_proj", "down_proj"], r=4, dropout=0.1)
    trainer.train()
    assert training.files(tmp_path / "checkpoint-8") == CHECKPOINT
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, GradientCheck)]
    usual = run(tmp_path / "usual")
    assert same(adapter_tensors(model), adapter_tensors(usual.model))


class TestModelsThatAreNotOurs:
    """Equal to the byte with the patch and without it: files, resume, best model."""

    def plain(self, seed: int) -> Any:
        return training.llama(seed)

    def with_peft(self, seed: int) -> Any:
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        with training.seeded(seed):
            return peft.get_peft_model(training.llama(), config)

    def flow(self, make: Any, folder: Path) -> dict[str, Any]:
        """Train with evaluation, resume from the middle, load the best; tell what came out."""
        options = {
            "eval_dataset": training.tokens(4, seed=8),
            "eval_strategy": "steps",
            "eval_steps": 4,
            "load_best_model_at_end": True,
        }
        first = training.trainer(make(1), folder / "first", **options)
        first.train()
        second = training.trainer(make(2), folder / "second", **options)
        second.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-4"))
        for key, tensor in first.model.state_dict().items():
            assert torch.equal(tensor, second.model.state_dict()[key]), key
        weights = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*.safetensors"))
        }
        callbacks = [type(c).__name__ for c in first.callback_handler.callbacks]
        return {"files": training.files(folder), "weights": weights, "callbacks": callbacks}

    @pytest.mark.parametrize("kind", ["plain", "with_peft"])
    def test_everything_is_the_same(self, tmp_path: Path, kind: str):
        make = getattr(self, kind)
        training.wrapped()
        assert patched("train")
        ours = self.flow(make, tmp_path / "patched")
        trainer_patch.disable()
        try:
            theirs = self.flow(make, tmp_path / "plain")
        finally:
            trainer_patch.enable()
        assert ours["files"] == theirs["files"]
        assert ours["callbacks"] == theirs["callbacks"]
        assert ours["weights"].keys() == theirs["weights"].keys()
        assert len(ours["weights"]) == 3  # steps 4 and 8, and 8 again
        assert all(ours["weights"][name] == theirs["weights"][name] for name in ours["weights"])


class Mixed(hf_lora.LoRATrainerMixin, Trainer):
    """What the documentation of the mixin says to write."""


class TestMixin:
    def test_it_does_the_same_without_the_patch(self, tmp_path: Path, no_patch: None):
        scores = iter([0.9, 0.1])
        first = training.trainer(
            training.wrapped(),
            tmp_path / "first",
            Mixed,
            eval_dataset=training.tokens(4, seed=8),
            compute_metrics=lambda _: {"score": next(scores)},
            eval_strategy="steps",
            eval_steps=4,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
        )
        first.train()
        checkpoint = tmp_path / "first" / "checkpoint-4"
        assert training.files(checkpoint) == CHECKPOINT
        assert same(training.in_file_names(first.model), training.saved(checkpoint))
        assert [c for c in first.callback_handler.callbacks if isinstance(c, GradientCheck)]
        second = training.trainer(training.wrapped(seed=9), tmp_path / "second", Mixed)
        second.train(resume_from_checkpoint=str(checkpoint))
        end = training.saved(tmp_path / "first" / "checkpoint-8")
        assert same(training.in_file_names(second.model), end)
        first.create_model_card()
        card = (tmp_path / "first" / "README.md").read_text()
        assert "library_name: peft" in card
        assert not any(map(patched, PATCHED))

    def test_without_both_trainer_cannot_resume(self, tmp_path: Path, no_patch: None):
        training.trainer(training.wrapped(), tmp_path, max_steps=1, save_steps=1).train()
        trainer = training.trainer(training.wrapped(), tmp_path)
        with pytest.raises(ValueError, match="Can't find a checkpoint index"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    def test_with_both_nothing_happens_twice(self, tmp_path: Path):
        trainer = training.trainer(training.wrapped(), tmp_path, Mixed, max_steps=1, save_steps=1)
        trainer.train()
        with pytest.warns(HfLoRAWarning) as told:
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert [w.category for w in told] == [HfLoRAWarning]  # nothing was left to train
        checks = [c for c in trainer.callback_handler.callbacks if isinstance(c, GradientCheck)]
        assert len(checks) == 1


def test_a_checkpoint_is_restored_through_ddp(tmp_path: Path):
    first = run(tmp_path, max_steps=1, save_steps=1)

    def restore() -> None:
        model = training.wrapped(seed=9)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        trainer = training.trainer(model, tmp_path / "second")
        trainer._load_from_checkpoint(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1"), model=parallel
        )
        assert same(adapter_tensors(model), adapter_tensors(first.model))
        restore_checkpoint(parallel, tmp_path / "checkpoint-1")

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        restore()
        gc.collect()  # DDP must not outlive its group: see tests/distributed/entry.py
    finally:
        dist.destroy_process_group()


WITHOUT_PEFT = """
import json, pathlib, sys
sys.modules["peft"] = None
from tests.integrations.without_peft import main
print(json.dumps(main(pathlib.Path(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/integrations/without_peft.py says in a process that cannot import peft."""
    folder = tmp_path_factory.mktemp("blocked")
    done = forked.run_code(WITHOUT_PEFT, str(folder), stage="torch")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class TestWithoutPeft:
    def test_trainer_is_patched_when_it_is_imported(self, blocked: dict[str, Any]):
        assert blocked["trainer imported by wrap"] is False
        assert blocked["patched"] is True

    def test_save_resume_and_best_work(self, blocked: dict[str, Any]):
        assert set(blocked["files"]) == CHECKPOINT
        assert blocked["resumed equal"] is True
        assert blocked["best equal"] is True

    def test_a_push_finds_the_adapter_where_trainer_pushes_from(self, blocked: dict[str, Any]):
        """Trainer itself copies an adapter's files only if peft is there."""
        assert blocked["pushed from"] == ["adapter_config.json", "adapter_model.safetensors"]

    def test_auto_classes_load_an_adapter(self, blocked: dict[str, Any]):
        assert blocked["auto before"] == "ValueError"
        assert blocked["auto"] == ["LlamaForCausalLM", "LoRALinear"]
        assert blocked["auto equal"] is True
        assert blocked["pipeline"] == ["LlamaForCausalLM", "LoRALinear"]
        assert blocked["auto after"] == "ValueError"

    def test_peft_was_never_there(self, blocked: dict[str, Any]):
        assert blocked["peft"] == []
