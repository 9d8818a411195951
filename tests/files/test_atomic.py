"""Saves that are killed, at random and between every two steps: the old adapter or the new one.

Each save runs in a forked child that ends by SIGKILL, as nothing can be cleaned up then.
"""

import os
import random
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hf_lora
from hf_lora.files.commit_note import PENDING_FILE
from hf_lora.files.write import copy_folder
from tests import tiny
from tests.files import edit
from tests.files.killing import die_before, in_child, was_killed


def loaded(folder: Path) -> torch.Tensor:
    """Load the adapter there, whatever it is, and return what the model answers."""
    return tiny.answers(hf_lora.load(tiny.Net(), folder))


def leftovers(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} - {edit.WEIGHTS, edit.CONFIG}


def test_a_hundred_kills_at_random_moments(tmp_path: Path):
    """The two adapters differ in rank, strength and trained modules, so both files change."""
    models = [tiny.adapted(seed=1), tiny.adapted(seed=2, r=3, alpha=5.0, train=["head"])]
    expected = [tiny.answers(model) for model in models]
    assert not torch.allclose(*expected)
    hf_lora.save(models[0], tmp_path)

    def save_on_and_on(told: int) -> None:
        while True:
            for model in reversed(models):
                start = time.monotonic()
                hf_lora.save(model, tmp_path)
                os.write(told, struct.pack("d", time.monotonic() - start))

    random_ = random.Random(7)
    kills, seen, interrupted = 0, [0, 0], 0
    # no idle kills: many fall into a save, and both adapters are found
    while kills < 100 or min(seen) < 10 or interrupted < 10:
        assert kills < 500, f"of 500 kills {interrupted} fell into a save; found: {seen}"
        kills += 1
        heard, told = os.pipe()
        pid = in_child(lambda told=told: save_on_and_on(told))
        os.close(told)
        for _ in range(random_.randint(1, 4)):
            message = os.read(heard, 8)
            assert message, "a save failed"
        # how long a save takes here and now, which under load is many times what it was before
        time.sleep(random_.uniform(0, 2 * struct.unpack("d", message)[0]))
        os.kill(pid, signal.SIGKILL)
        assert was_killed(pid)
        os.close(heard)
        interrupted += bool(leftovers(tmp_path))
        answer = loaded(tmp_path)
        which = [torch.equal(answer, one) for one in expected]
        assert any(which)
        seen[which.index(True)] += 1

    hf_lora.save(models[1], tmp_path)
    assert leftovers(tmp_path) == set()


def test_a_note_cut_short_is_cleared_though_the_json_stays_the_same(tmp_path: Path):
    """Only a save that changes the JSON writes a note of its own."""
    model = tiny.adapted()
    hf_lora.save(model, tmp_path)
    pid = in_child(lambda: None)
    os.waitpid(pid, 0)
    owner = f"{socket.gethostname()}-{pid}-1"
    left = tmp_path / f".{PENDING_FILE}.{owner}.tmp"
    left.write_bytes(b"{")
    assert leftovers(tmp_path) == {left.name}
    hf_lora.save(model, tmp_path)
    assert leftovers(tmp_path) == set()


def ours(folder: Path) -> None:
    tiny.saved(folder, seed=1)


def ours_of_the_same_kind(folder: Path) -> None:
    """Only the weights will change, not the JSON."""
    tiny.saved(folder, seed=1, r=3, alpha=5.0, train=["head"])


def pefts(folder: Path) -> None:
    ours(folder)
    edit.as_pefts(folder)


def weights_alone(folder: Path) -> None:
    ours(folder)
    (folder / edit.CONFIG).unlink()


def note_of_an_earlier_kill(folder: Path) -> None:
    ours(folder)
    (folder / ".adapter_config.json.pending").write_text('{"adapter_config": {"peft_type": "X"}}')


def nothing(folder: Path) -> None:
    """Not even the folder."""


@pytest.mark.filterwarnings("ignore:.*adapter_config.json is missing")
@pytest.mark.parametrize(
    "old",
    [ours, ours_of_the_same_kind, pefts, weights_alone, note_of_an_earlier_kill, nothing],
    ids=lambda old: old.__name__,
)
@pytest.mark.parametrize("new", ["saved", "copied"])
def test_killed_between_any_two_steps(tmp_path: Path, old: Callable[[Path], None], new: str):
    """Also where the new adapter is a foreign one, which has nothing in its header to go by."""
    model = tiny.adapted(seed=2, r=3, alpha=5.0, train=["head"])
    after = tiny.answers(model)
    hf_lora.save(model, tmp_path / "source")
    edit.as_pefts(tmp_path / "source")
    old(tmp_path / "old")
    before = loaded(tmp_path / "old") if old is not nothing else None

    def write(folder: Path) -> None:
        if new == "saved":
            hf_lora.save(model, folder)
        else:
            copy_folder(tmp_path / "source", folder)

    outcomes = []
    for step in range(1, 60):
        folder = tmp_path / f"kill{step}" / "adapter"
        if old is not nothing:
            shutil.copytree(tmp_path / "old", folder)

        def work(step: int = step, folder: Path = folder) -> None:
            die_before(step)
            write(folder)

        killed = was_killed(in_child(work))
        if before is None and not (folder / edit.WEIGHTS).is_file():
            outcomes.append("nothing")
        else:
            answer = loaded(folder)
            assert torch.equal(answer, after) or (
                before is not None and torch.equal(answer, before)
            )
            outcomes.append("new" if torch.equal(answer, after) else "old")
        write(folder)
        assert leftovers(folder) == set()
        assert torch.equal(loaded(folder), after)
        if not killed:
            break
    else:
        pytest.fail("a save has fewer steps than that")
    assert outcomes[0] in ("old", "nothing")
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["nothing", "old", "new"].index)
    assert len(outcomes) > 5


def test_what_a_dead_process_left_is_cleaned_up_and_nothing_else(tmp_path: Path):
    host, pid = socket.gethostname(), os.getpid()
    dead = in_child(lambda: None)
    os.waitpid(dead, 0)
    gone = [
        f".adapter_model.safetensors.{host}-{dead}-1.tmp",
        f".adapter_config.json.{host}-{dead}-{2**63}.tmp",
        f".adapter_model.safetensors.{host}-{pid}-1.tmp",  # the number of a process that is gone
        f".adapter_config.json.{host}-{pid}-{threading.get_ident()}.tmp",
    ]
    kept = [
        f".adapter_model.safetensors.{host}-{os.getppid()}-1.tmp",
        f".adapter_model.safetensors.another-host-{dead}-1.tmp",
        f".adapter_model.safetensors.{host}-{'9' * 30}-1.tmp",
        f".adapter_model.safetensors.{host}-²-1.tmp",
        f"adapter_model.safetensors.{host}-{dead}-1.tmp",
        ".adapter_model.safetensors.tmp",
        "notes.txt",
    ]
    for name in gone + kept:
        (tmp_path / name).write_text("x")
    (tmp_path / f".adapter_model.safetensors.{host}-{dead}-3.tmp").mkdir()
    tiny.saved(tmp_path)
    folder = f".adapter_model.safetensors.{host}-{dead}-3.tmp"
    assert leftovers(tmp_path) == {*kept, folder}


def test_threads_that_save_at_once_do_not_mix_their_files(tmp_path: Path):
    """Weights of one with the JSON of another would be no adapter at all."""
    models = [tiny.adapted(seed=seed, r=1 + seed % 3) for seed in range(6)]
    errors: list[BaseException] = []

    def save(model: tiny.Net) -> None:
        try:
            for _ in range(5):
                hf_lora.save(model, tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert leftovers(tmp_path) == set()
    answer = loaded(tmp_path)
    assert any(torch.equal(answer, tiny.answers(model)) for model in models)


def test_processes_that_save_at_once_do_not_mix_their_files(tmp_path: Path):
    models = [tiny.adapted(seed=seed, r=1 + seed) for seed in range(3)]

    def save_often(model: tiny.Net) -> None:
        for _ in range(10):
            hf_lora.save(model, tmp_path)

    children = [in_child(lambda model=model: save_often(model)) for model in models]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert leftovers(tmp_path) == set()
    answer = loaded(tmp_path)
    assert any(torch.equal(answer, tiny.answers(model)) for model in models)
