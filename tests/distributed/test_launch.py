"""The launcher of the other tests: a failure shows its log, and nothing is left running."""

import os
import time
from pathlib import Path

import pytest

from tests.distributed.launch import LaunchError, accelerate, launch, torchrun


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("launcher", [torchrun, accelerate])
def test_each_process_knows_its_rank(tmp_path: Path, launcher):
    told = launch("broken_worker:works", tmp_path, launcher=launcher)
    assert told == [
        {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in (0, 1)
    ]


def test_a_process_that_fails_ends_the_others_and_shows_its_log(tmp_path: Path):
    with pytest.raises(LaunchError, match=r"exit code 1\n(.*\n)*.*the second process had enough"):
        launch("broken_worker:one_fails", tmp_path)
    assert not is_running(int((tmp_path / "waiting").read_text()))


def test_processes_that_hang_are_ended_and_say_where(tmp_path: Path):
    began = time.monotonic()
    launch("broken_worker:works", tmp_path)
    # as long as they need to start here and now, and more; they hang for an hour
    limit = 2 + 2 * (time.monotonic() - began)
    with pytest.raises(LaunchError, match="all_hang"):
        launch("broken_worker:all_hang", tmp_path, limit=limit)
    pids = [int(path.read_text()) for path in tmp_path.glob("hanging-*")]
    assert len(pids) == 2
    assert not any(map(is_running, pids))
