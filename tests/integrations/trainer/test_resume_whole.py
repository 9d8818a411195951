"""Resuming goes on from whole checkpoints only: others are passed over, refused, or told of."""

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import hf_lora
from hf_lora.errors import AdapterFileError, HfLoRAWarning
from hf_lora.files.manifest import MANIFEST_FILE, begin_manifest, finish_manifest
from tests.integrations import training
from tests.integrations.training import Run, adapter_tensors, run, same

STATES = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "training_args.bin"]
STEPS = {"max_steps": 4, "save_steps": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps with dropout, a checkpoint after each."""
    return run(tmp_path_factory.mktemp("whole"), **STEPS)


@pytest.fixture
def folder(whole: Run, tmp_path: Path) -> Path:
    """Its checkpoints 1 to 3, to do harm to the newest."""
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    return tmp_path / "run"


def resume(folder: Path, wanted: Any = True, **fields: Any) -> Run:
    return run(folder, wanted, model=training.wrapped(seed=9), **{**STEPS, **fields})


def ends_alike(a: Run, b: Run) -> bool:
    return same(adapter_tensors(a.model), adapter_tensors(b.model))


def keep(*names: str) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        for file in checkpoint.iterdir():
            if file.name not in names:
                file.unlink()

    return harm


def lose(*names: str) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        for name in names:
            (checkpoint / name).unlink()

    return harm


def flip(name: str) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        at = len(content) // 3
        if content.startswith(b"PK"):  # past the padding, in the largest thing that is in it
            with zipfile.ZipFile(checkpoint / name) as archive:
                largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            lengths = content[largest.header_offset + 26 : largest.header_offset + 30]
            at = largest.header_offset + 30 + sum(struct.unpack("<HH", lengths)) + 100
        content[at] ^= 1
        (checkpoint / name).write_bytes(content)

    return harm


def cut(name: str) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return harm


def of_another_step(name: str) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        shutil.copy(checkpoint.with_name("checkpoint-1") / name, checkpoint / name)

    return harm


HARM = {
    "nothing in it": keep(),
    "the adapter alone": keep(*ADAPTER),
    "all but what is written last": lose("trainer_state.json"),
    **{f"{name} lost": lose(name) for name in STATES},
    "all states lost": lose(*STATES),
    **{f"a bit of {name}": flip(name) for name in [*STATES, ADAPTER[1], "trainer_state.json"]},
    **{f"half of {name}": cut(name) for name in [*STATES, ADAPTER[1], "trainer_state.json"]},
    **{f"{name} of another step": of_another_step(name) for name in [*STATES, ADAPTER[1]]},
}
UNSEEN = ("another step", "all states lost", "a bit of trainer_state.json")
SEEN_WITHOUT = [name for name in HARM if not any(words in name for words in UNSEEN)]
"""What can be seen in a checkpoint without a manifest, which older versions wrote, and others."""


@pytest.mark.parametrize("harm", HARM)
class TestHarm:
    def test_it_is_passed_over(self, whole: Run, folder: Path, harm: str):
        HARM[harm](folder / "checkpoint-3")
        with pytest.warns(HfLoRAWarning, match=r"(?s)from .*checkpoint-2; newer.*checkpoint-3: "):
            assert ends_alike(resume(folder), whole)

    def test_it_is_refused_where_it_is_named(self, folder: Path, harm: str):
        HARM[harm](folder / "checkpoint-3")
        model = training.wrapped(seed=9)
        before = adapter_tensors(model)
        with pytest.raises(AdapterFileError, match=r"(?s)not whole.*resume from .*checkpoint-2"):
            run(folder, str(folder / "checkpoint-3"), model=model, **STEPS)
        assert same(adapter_tensors(model), before)


@pytest.mark.parametrize("harm", SEEN_WITHOUT)
def test_it_is_seen_without_a_manifest(whole: Run, folder: Path, harm: str):
    for checkpoint in folder.iterdir():
        (checkpoint / MANIFEST_FILE).unlink()
    HARM[harm](folder / "checkpoint-3")
    with pytest.warns(HfLoRAWarning, match=r"(?s)from .*checkpoint-2; newer.*checkpoint-3: "):
        assert ends_alike(resume(folder), whole)


def test_whole_ones_without_a_manifest_are_resumed(whole: Run, folder: Path):
    (folder / "checkpoint-3" / MANIFEST_FILE).unlink()
    assert ends_alike(resume(folder), whole)


def test_one_that_was_saved_without_states_goes_on_and_says_so(tmp_path: Path):
    run(tmp_path, save_only_model=True, **STEPS)
    shutil.rmtree(tmp_path / "checkpoint-4")
    for with_manifest in (True, False):
        if not with_manifest:
            shutil.rmtree(tmp_path / "checkpoint-4")
            (tmp_path / "checkpoint-3" / MANIFEST_FILE).unlink()
        with pytest.warns(HfLoRAWarning, match=r"(?s)without these:.*optimizer.*schedule.*random"):
            assert resume(tmp_path, save_only_model=True).trainer.state.global_step == 4


def test_a_run_that_was_killed_in_its_first_save_begins_anew(whole: Run, folder: Path):
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.rmtree(folder / name)
    keep(*ADAPTER)(folder / "checkpoint-3")
    model = training.wrapped()
    torch.manual_seed(1)
    with pytest.warns(HfLoRAWarning, match=r"(?s)Nothing to go on from.*checkpoint-3: .*cut short"):
        assert ends_alike(run(folder, True, model=model, **STEPS), whole)  # type: ignore[arg-type]


def test_so_does_one_that_was_killed_while_trainer_wrote_its_last_file(whole: Run, folder: Path):
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.rmtree(folder / name)
    begin_manifest(folder / "checkpoint-3")
    (folder / "checkpoint-3" / "trainer_state.json").write_bytes(b"")
    torch.manual_seed(1)
    with pytest.warns(HfLoRAWarning, match="Nothing to go on from"):
        again = run(folder, True, model=training.wrapped(), **STEPS)  # type: ignore[arg-type]
    assert ends_alike(again, whole)


def test_a_run_of_which_all_is_damaged_does_not_begin_anew(folder: Path):
    for checkpoint in folder.iterdir():
        flip("optimizer.pt")(checkpoint)
    with pytest.raises(AdapterFileError, match=r"(?s)No checkpoint .* is whole.*-3.*-2.*-1: "):
        resume(folder)


def test_no_checkpoint_at_all_is_trainers_own_error(tmp_path: Path):
    with pytest.raises(ValueError, match="No valid checkpoint"):
        resume(tmp_path)


@pytest.mark.parametrize("fields", [{}, {"num_train_epochs": 1, "max_steps": -1}])
def test_a_finished_run_stays_finished(tmp_path: Path, fields: dict):
    """In the middle of an epoch and at its end."""
    first = run(tmp_path, **{**STEPS, **fields})
    with pytest.warns(HfLoRAWarning, match="nothing was trained. Raise max_steps"):
        again = resume(tmp_path, **fields)
    assert ends_alike(again, first)
    assert again.trainer.state.global_step == first.trainer.state.global_step
    card = hf_lora.hub.card.training.run_of(again.trainer).told({})
    assert "Mean training loss" not in card.hyperparameters


def test_a_finished_run_goes_on_where_there_is_more_to_do(tmp_path: Path):
    longer = {"max_steps": 6, "lr_scheduler_type": "constant", "warmup_steps": 0}
    want = run(tmp_path / "long", **{**STEPS, **longer})
    run(tmp_path / "short", **{**STEPS, **longer, "max_steps": 4})
    assert ends_alike(resume(tmp_path / "short", **longer), want)


SCORED = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "score",
    "greater_is_better": True,
    "load_best_model_at_end": True,
    **STEPS,
    "max_steps": 8,
}


def stopping(folder: Path, resume: Any = None, scores: tuple = (3, 2, 1, 0), **fields: Any) -> Run:
    """A run that stops early, after two evaluations that were no better."""
    given = iter(scores)
    return run(
        folder,
        resume,
        model=training.wrapped(seed=9 if resume else 1),
        eval_dataset=training.tokens(2, seed=8),
        compute_metrics=lambda _: {"score": next(given)},
        callbacks=[EarlyStoppingCallback(2)],
        **{**SCORED, **fields},
    )


def test_an_early_stopped_run_stays_finished_if_its_callbacks_are_restored(tmp_path: Path):
    first = stopping(tmp_path)
    assert first.trainer.state.global_step == 3
    with pytest.warns(HfLoRAWarning, match="nothing was trained"):
        again = stopping(tmp_path, True, restore_callback_states_from_checkpoint=True)
    assert ends_alike(again, first)
    assert training.checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_callbacks_that_would_forget_are_told_of(tmp_path: Path):
    stopping(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-3")
    with pytest.warns(HfLoRAWarning, match="EarlyStoppingCallback .pass restore_callback_states"):
        again = stopping(tmp_path, True, scores=(1, 0))
    assert again.trainer.state.global_step == 4  # it counted anew
    shutil.rmtree(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-4")
    right = stopping(tmp_path, True, scores=(1, 0), restore_callback_states_from_checkpoint=True)
    assert right.trainer.state.global_step == 3


class TestSaving:
    def test_the_manifest_lists_what_a_resume_reads(self, whole: Run):
        found = json.loads((whole.folder / "checkpoint-3" / MANIFEST_FILE).read_text())
        assert found["complete"] is True
        assert set(found["parts"]) == {*STATES, ADAPTER[1], "trainer_state.json"}

    def test_a_checkpoint_is_not_complete_before_all_is_there(self, tmp_path: Path):
        """Also where an older run has left a whole one of the same step."""
        run(tmp_path, **STEPS)

        class Dying(Trainer):
            def _save_rng_state(self, output_dir: str) -> None:
                if output_dir.endswith("-3"):
                    raise KeyboardInterrupt
                super()._save_rng_state(output_dir)

        trainer = training.trainer(training.wrapped(seed=5), tmp_path, cls=Dying, **STEPS)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert not json.loads((tmp_path / "checkpoint-3" / MANIFEST_FILE).read_text())["complete"]
        shutil.rmtree(tmp_path / "checkpoint-4")
        with pytest.warns(HfLoRAWarning, match="checkpoint-3: its save was cut short"):
            resume(tmp_path)

    def test_older_ones_are_deleted_only_then(self, tmp_path: Path, monkeypatch: Any):
        import transformers.trainer as module

        rotate, seen = module.rotate_checkpoints, []

        def watched(**kwargs: Any) -> None:
            newest = tmp_path / training.checkpoints(tmp_path)[-1]
            seen.append(json.loads((newest / MANIFEST_FILE).read_text())["complete"])
            rotate(**kwargs)

        monkeypatch.setattr(module, "rotate_checkpoints", watched)
        run(tmp_path, save_total_limit=1, **STEPS)
        assert seen == [True] * 4
        assert training.checkpoints(tmp_path) == ["checkpoint-4"]

    def test_what_others_add_or_change_is_theirs(self, whole: Run, folder: Path):
        """A tokenizer, a card, the base's name in the JSON: nothing that a resume goes by."""
        newest = folder / "checkpoint-3"
        (newest / "README.md").write_text("mine")
        fields = json.loads((newest / ADAPTER[0]).read_text())
        (newest / ADAPTER[0]).write_text(json.dumps({**fields, "base_model_name_or_path": "me/it"}))
        (newest / "training_args.bin").unlink()
        assert ends_alike(resume(folder), whole)

    def test_a_callback_may_write_into_a_checkpoint(self, tmp_path: Path):
        class Adds(TrainerCallback):
            def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                (tmp_path / f"checkpoint-{state.global_step}" / "mine.pt").write_bytes(b"1")

        want = run(tmp_path, callbacks=[Adds()], **STEPS)
        shutil.rmtree(tmp_path / "checkpoint-4")
        assert ends_alike(resume(tmp_path), want)

    def test_other_peoples_models_get_none(self, tmp_path: Path):
        trainer = training.trainer(training.llama(), tmp_path, max_steps=1, save_steps=1)
        trainer.train()
        assert not (tmp_path / "checkpoint-1" / MANIFEST_FILE).exists()

    @pytest.mark.parametrize(
        "text",
        ["", "[]", '{"complete": true}', '{"complete": true, "parts": {"../x": {}}}'],
    )
    def test_a_manifest_that_says_nothing_is_damage(self, whole: Run, folder: Path, text: str):
        (folder / "checkpoint-3" / MANIFEST_FILE).write_text(text)
        with pytest.warns(HfLoRAWarning, match="checkpoint-3: .*checkpoint_manifest.json"):
            assert ends_alike(resume(folder), whole)


def test_two_adapters_and_a_frozen_one_are_judged_alike(tmp_path: Path):
    def make(seed: int) -> Any:
        model = training.wrapped(seed=seed)
        hf_lora.add_adapter(model, "fr", targets="q_proj", r=2, trainable=False)
        return model

    want = run(tmp_path, model=make(1), **STEPS)
    shutil.rmtree(tmp_path / "checkpoint-4")
    of_another = tmp_path / "checkpoint-2" / "fr" / ADAPTER[1]
    model = make(3)  # another frozen adapter, whole in itself
    hf_lora.save(model, tmp_path / "other")
    shutil.copy(
        tmp_path / "other" / "fr" / ADAPTER[1], of_another.parents[2] / "checkpoint-3" / "fr"
    )
    with pytest.warns(HfLoRAWarning, match="checkpoint-3: 'fr/adapter_model.safetensors'"):
        assert ends_alike(run(tmp_path, True, model=make(4), **STEPS), want)  # type: ignore[arg-type]


def test_a_manifest_can_be_written_for_what_was_changed_on_purpose(folder: Path):
    of_another_step("optimizer.pt")(folder / "checkpoint-3")
    finish_manifest(folder / "checkpoint-3")
    assert resume(folder).trainer.state.global_step == 4
