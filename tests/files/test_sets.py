"""Several adapters saved together, killed between them: all old, all new, or told at the load."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hf_lora
from hf_lora.adapter_io.restore import restore_checkpoint
from hf_lora.files.set_note import SET_FILE
from hf_lora.files.write import copy_folders
from tests import tiny
from tests.files import edit
from tests.files.killing import die_before, in_child, was_killed
from tests.integrations import training

RANKS = {"default": 2, "fr": 1, "de": 3}
CUT_SHORT = "of different saves now"


def make(seed: int, extra: int = 0) -> tiny.Net:
    """Three adapters; with other ranks the JSON of each changes as well."""
    model = hf_lora.wrap(tiny.Net(), targets=["q_proj", "v_proj"], r=2 + extra)
    for name in ("fr", "de"):
        hf_lora.add_adapter(model, name, targets=["q_proj"], r=RANKS[name] + extra)
    tiny.scramble(model, seed)
    return model


def place(folder: Path, name: str) -> Path:
    return folder if name == "default" else folder / name


def answers(model: tiny.Net, name: str) -> torch.Tensor:
    with hf_lora.use_adapter(model, name):
        return tiny.answers(model)


def found(folder: Path, *sets: tiny.Net) -> tuple[list[int | None], bool]:
    """Load each adapter; say of which of ``sets`` it is, and whether a load told of a mixture."""
    ages: list[int | None] = []
    told = []
    for name in RANKS:
        if not (place(folder, name) / edit.WEIGHTS).is_file():
            ages.append(None)
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = hf_lora.load(tiny.Net(), place(folder, name))
        told.append(any(CUT_SHORT in str(warning.message) for warning in caught))
        answer = tiny.answers(model)
        ages.append(
            next(n for n, one in enumerate(sets) if torch.equal(answer, answers(one, name)))
        )
    return ages, any(told)


def kill_in(folder: Path, step: int, work: Callable[[], None]) -> bool:
    def dies() -> None:
        die_before(step, ("replace", "unlink"))
        work()

    return was_killed(in_child(dies))


@pytest.mark.parametrize("extra", [0, 1], ids=["the weights change", "the JSON changes too"])
@pytest.mark.parametrize("how", ["saved", "copied"])
def test_killed_between_any_two_steps(tmp_path: Path, extra: int, how: str):
    old, new = make(1), make(2, extra)
    hf_lora.save(old, tmp_path / "old")
    hf_lora.save(new, tmp_path / "new")

    def write(folder: Path) -> None:
        if how == "saved":
            hf_lora.save(new, folder)
        else:
            sources = {place(folder, name): place(tmp_path / "new", name) for name in RANKS}
            copy_folders(folder, sources)

    outcomes = []
    for step in range(1, 100):
        folder = tmp_path / f"kill{step}"
        shutil.copytree(tmp_path / "old", folder)
        killed = kill_in(folder, step, lambda folder=folder: write(folder))
        ages, told = found(folder, old, new)
        assert told == (len(set(ages)) > 1), f"step {step}: {ages}"
        outcomes.append(ages)
        write(folder)
        assert found(folder, old, new) == ([1, 1, 1], False)
        left = {path.name for path in folder.rglob("*")} - {"fr", "de", edit.WEIGHTS, edit.CONFIG}
        assert left == set()
        if not killed:
            break
    else:
        pytest.fail("a save has fewer steps than that")
    assert outcomes[0] == [0, 0, 0]
    assert outcomes[-1] == [1, 1, 1]
    assert any(len(set(ages)) > 1 for ages in outcomes)
    shutil.rmtree(tmp_path)


def mixed(folder: Path, old: tiny.Net, new: tiny.Net) -> None:
    """Leave the folder as a kill between the first and the last adapter does."""
    for step in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        hf_lora.save(old, folder)
        kill_in(folder, step, lambda: hf_lora.save(new, folder))
        ages, _ = found(folder, old, new)
        if ages == [1, 0, 0]:
            return
    pytest.fail("no kill left a mixture")


def test_a_second_kill_does_not_hide_the_first(tmp_path: Path):
    """A save that replaces nothing leaves the mixture that it found, and the word of it."""
    old, new, newest = make(1), make(2), make(3)
    mixed(tmp_path / "set", old, new)
    before = 0
    for step in range(1, 100):
        folder = tmp_path / f"kill{step}"
        shutil.copytree(tmp_path / "set", folder)
        killed = kill_in(folder, step, lambda folder=folder: hf_lora.save(newest, folder))
        ages, told = found(folder, old, new, newest)
        assert told == (len(set(ages)) > 1), f"step {step}: {ages}"
        before += ages == [1, 0, 0]
        if not killed:
            break
    assert before > 1
    assert ages == [2, 2, 2]


def test_adapters_saved_each_by_itself_are_no_longer_told_of(tmp_path: Path):
    old, new = make(1), make(2)
    mixed(tmp_path, old, new)
    hf_lora.save(new, tmp_path, adapter="fr")
    assert found(tmp_path, old, new) == ([1, 1, 0], True)
    hf_lora.save(old, tmp_path)
    mixed(tmp_path, old, new)
    hf_lora.save(old, tmp_path, adapter="default")
    assert found(tmp_path, old, new) == ([0, 0, 0], False)
    hf_lora.save(new, tmp_path, adapter="de")  # on purpose, so nothing is told
    assert found(tmp_path, old, new) == ([0, 0, 1], False)
    assert not (tmp_path / SET_FILE).exists()


def test_a_mixture_is_the_state_of_no_training(tmp_path: Path):
    old, new = make(1), make(2)
    mixed(tmp_path, old, new)
    model = make(5)
    before = {name: answers(model, name) for name in RANKS}
    with pytest.raises(hf_lora.AdapterFileError, match=CUT_SHORT):
        restore_checkpoint(model, tmp_path)
    assert all(torch.equal(answers(model, name), before[name]) for name in RANKS)


def test_an_error_in_between_is_told_too_and_one_before_leaves_no_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old, new = make(1), make(2)
    hf_lora.save(old, tmp_path)
    replace, left = os.replace, 0

    def broken(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0 and Path(target).name == edit.WEIGHTS:
            raise OSError(5, "the disk is gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", broken)
    for count, ages in ((2, [0, 0, 0]), (3, [1, 0, 0]), (4, [1, 1, 0])):
        left = count
        with pytest.raises(hf_lora.SaveError):
            hf_lora.save(new, tmp_path)
        assert found(tmp_path, old, new) == (ages, len(set(ages)) > 1)
        assert (tmp_path / SET_FILE).exists() == (len(set(ages)) > 1)
        left = 0
        hf_lora.save(old, tmp_path)


def test_save_pretrained_of_chosen_adapters_is_one_save(tmp_path: Path):
    def two(seed: int) -> torch.nn.Module:
        model = training.wrapped()
        hf_lora.add_adapter(model, "fr", ["q_proj"], r=2)
        tiny.scramble(model, seed)
        return model

    old, new = two(1), two(2)
    told = 0
    for step in range(1, 100):
        folder = tmp_path / str(step)
        old.save_pretrained(folder)
        killed = kill_in(
            folder,
            step,
            lambda folder=folder: new.save_pretrained(folder, selected_adapters=["fr", "default"]),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hf_lora.load(training.llama(), folder)
        same = {
            training.same(training.saved(place(folder, n)), training.in_file_names(new, n))
            for n in ("fr", "default")
        }
        assert bool(caught) == (len(same) > 1)
        told += bool(caught)
        if not killed:
            break
    assert same == {True}
    assert told


def test_a_folder_named_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its note is found under another path, and nothing waits for itself."""
    old, new = make(1), make(2)
    mixed(tmp_path / "set", old, new)
    monkeypatch.chdir(tmp_path)
    assert found(Path("set"), old, new) == ([1, 0, 0], True)
    hf_lora.save(old, "set", adapter="default")
    assert found(Path("set"), old, new) == ([0, 0, 0], False)
    mixed(tmp_path / "set", old, new)
    monkeypatch.chdir(tmp_path / "set")
    hf_lora.save(new, ".")
    assert found(tmp_path / "set", old, new) == ([1, 1, 1], False)


@pytest.mark.parametrize(
    "note",
    [
        "{",
        "[]",
        '{"folders": 3}',
        '{"folders": {"../../other": {}, ".": {}}, "mixed_before": true}',
        '{"folders": {"/etc": {}, ".": {}}, "mixed_before": true}',
        '{"folders": {".": 1}}',
        '{"folders": {".": {"weights_sha256": [], "adapter_config": 1}}}',
    ],
)
def test_a_note_that_somebody_made_up_leads_nowhere(tmp_path: Path, note: str):
    expected = tiny.saved(tmp_path)
    (tmp_path / SET_FILE).write_text(note)
    assert torch.equal(tiny.answers(hf_lora.load(tiny.Net(), tmp_path)), expected)


def test_the_note_says_nothing_once_all_are_new(tmp_path: Path):
    """Killed after the last adapter and before the note was taken away."""
    old, new = make(1), make(2)
    hf_lora.save(old, tmp_path)
    for step in range(1, 100):
        kill_in(tmp_path, step, lambda: hf_lora.save(new, tmp_path))
        ages, told = found(tmp_path, old, new)
        if ages == [1, 1, 1] and (tmp_path / SET_FILE).exists():
            assert not told
            assert json.loads((tmp_path / SET_FILE).read_text())["mixed_before"] is False
            return
        hf_lora.save(old, tmp_path)
    pytest.fail("no kill came there")
