"""The launcher of the other tests: a failure shows its log, and nothing is left running."""

from pathlib import Path

import pytest

from tests.distributed.broken_worker import NAMES
from tests.distributed.launch import Launcher, LaunchError, accelerate, launch, torchrun
from tests.forked import await_end

OWN = ("ACCELERATE_", "FSDP_", "ROLE_NAME", "TORCHELASTIC_", "TORCH_NCCL_")
"""Names of what only real launchers say: their settings, and what they do after a failure."""


@pytest.mark.parametrize("launcher", [None, torchrun, accelerate])
def test_each_process_knows_its_rank(tmp_path: Path, launcher: Launcher | None):
    told = launch("broken_worker:works", tmp_path, launcher=launcher)
    assert [{name: each[name] for name in NAMES} for each in told] == [
        {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in (0, 1)
    ]
    store = told[0]["MASTER_PORT"]
    assert all(each["MASTER_PORT"] == store for each in told)
    if launcher is torchrun:  # forks are told all that counts, in the same words
        for theirs, ours in zip(told, launch("broken_worker:works", tmp_path), strict=True):
            theirs["MASTER_PORT"] = ours["MASTER_PORT"]
            kept = {k: v for k, v in theirs.items() if k in ours or not k.startswith(OWN)}
            kept["TORCHELASTIC_RUN_ID"] = ours["TORCHELASTIC_RUN_ID"]
            assert ours == kept


@pytest.mark.parametrize("launcher", [None, torchrun])
def test_a_process_that_fails_ends_the_others_and_shows_its_log(
    tmp_path: Path, launcher: Launcher | None
):
    with pytest.raises(LaunchError, match=r"exit code 1\n(.*\n)*.*the second process had enough"):
        launch("broken_worker:one_fails", tmp_path, launcher=launcher)
    await_end(int((tmp_path / "waiting").read_text()))


@pytest.mark.parametrize("launcher", [None, torchrun])
def test_processes_that_hang_are_ended_and_say_where(tmp_path: Path, launcher: Launcher | None):
    for limit in (2, 16, 128):  # until it is long enough for two to start
        with pytest.raises(LaunchError, match="all_hang") as caught:
            launch("broken_worker:all_hang", tmp_path, launcher=launcher, limit=limit)
        pids = [int(path.read_text()) for path in tmp_path.glob("hanging-*")]
        for pid in pids:
            await_end(pid)
        if "in all_hang" in str(caught.value):
            break
    assert len(pids) == 2
    assert "in all_hang" in str(caught.value)
