"""Trainings killed at random, as often as it comes, and resumed by True: all end to the bit alike.

Each run is a forked child of this process, which has imported everything, so that it takes less
than a second. Most of that is saving: a checkpoint after every step.
"""

import contextlib
import dataclasses
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from tests.integrations import training

LAST = "checkpoint-5/adapter_model.safetensors"
MOST_KILLS = 3
"""Of one training; then it is left alone, so that each comes to its end."""
FILES = 40
"""About as many as a training writes."""


@dataclasses.dataclass
class Tally:
    kills: int = 0
    in_a_save: int = 0
    """Kills that left a checkpoint which is not whole."""

    passed_over: int = 0
    """Runs that told of such a one, and went on from an older."""


def train(folder: Path) -> None:
    """Train five steps, or what is left of them."""
    torch.manual_seed(0)
    training.run(
        folder,
        bool(training.checkpoints(folder)),  # type: ignore[arg-type]
        model=training.wrapped(targets=["q_proj"], fields={"num_hidden_layers": 1}),
        max_steps=5,
        save_steps=1,
        save_total_limit=3,
    )


def child(folder: Path) -> int:
    """Train in a forked child, resuming if there is anything; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        sys.stdout = sys.stderr = (folder.parent / "log").open("w")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(folder)
        told = [w for w in caught if "not whole" in str(w.message)]
        status = 3 if told else 0
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(status)


def half_saved(folder: Path) -> bool:
    """Whether the newest checkpoint lacks a file."""
    found = training.checkpoints(folder)
    return bool(found) and not training.files(folder / found[-1]) >= training.CHECKPOINT


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for_files(pid: int, folder: Path, count: int) -> None:
    """Wait until a run has written so many files, or has ended."""
    there = written(folder)
    seen = set(there)
    while len(seen - there) < count and not has_ended(pid):
        seen |= written(folder)
        time.sleep(0.0005)


def written(folder: Path) -> set[Path]:
    with contextlib.suppress(FileNotFoundError):  # a checkpoint is being deleted
        return set(folder.glob("*/*"))
    return set()


def train_and_kill(folder: Path, chance: random.Random, tally: Tally) -> None:
    """Train to the end, killed on the way when a random number of files are written."""
    for number in range(MOST_KILLS + 1):
        pid = child(folder)
        if number < MOST_KILLS:
            wait_for_files(pid, folder, chance.randint(1, FILES // (number + 1)))
            time.sleep(chance.choice([0, 0, chance.uniform(0, 0.1)]))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            tally.kills += 1
            tally.in_a_save += half_saved(folder)
            continue
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 3), (folder.parent / "log").read_text()
        tally.passed_over += code == 3
        return


def attempt(tmp_path: Path, trainings: int, seed: int = 5) -> Tally:
    train(tmp_path / "warm")  # imports what children will need
    whole = tmp_path / "whole" / "run"
    whole.parent.mkdir()
    assert os.waitstatus_to_exitcode(os.waitpid(child(whole), 0)[1]) == 0
    want, chance, tally = (whole / LAST).read_bytes(), random.Random(seed), Tally()
    for number in range(trainings):
        folder = tmp_path / str(number) / "run"
        folder.parent.mkdir()
        train_and_kill(folder, chance, tally)
        assert (folder / LAST).read_bytes() == want, f"training {number} ended elsewhere"
    return tally


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_few_trainings_end_as_one_that_was_never_killed(tmp_path: Path):
    tally = attempt(tmp_path, 3)
    assert tally.kills > 3
    assert tally.in_a_save > 0


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_hundred_trainings_end_as_one_that_was_never_killed(tmp_path: Path):
    tally = attempt(tmp_path, 100)
    print(tally)
    assert tally.kills > 150
    assert tally.in_a_save > 50
    assert tally.passed_over > 0
