"""Two data-parallel processes over gloo: one writes, both resume and end with the best."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hf.training import CHECKPOINT

ROOT = Path(__file__).parents[2]
WORKER = """
import json, pathlib, sys
from tests.hf.ddp_worker import main
print(json.dumps(main(pathlib.Path(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes says."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    folder = str(tmp_path_factory.mktemp("ddp"))
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, folder],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    ended = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def test_there_were_two(told: list[dict[str, Any]]):
    assert [each["processes"] for each in told] == [2, 2]
    assert told[0]["around the model"] == "DistributedDataParallel"


def test_the_checkpoint_holds_the_adapter_once(told: list[dict[str, Any]]):
    states = {"rng_state_0.pth", "rng_state_1.pth"}
    assert set(told[0]["files"]) == (CHECKPOINT - {"rng_state.pth"}) | states


def test_both_resume_and_end_with_the_best(told: list[dict[str, Any]]):
    for each in told:
        assert each["resumed equal"] is True
        assert each["best equal"] is True


def test_both_have_the_same_adapter(told: list[dict[str, Any]]):
    assert told[0]["sum"] == told[1]["sum"] != 0
