"""Starting the processes of a distributed test, and ending them: in time, all of them, with logs.

A worker is a function of a module in this folder that takes a folder and returns what it has to
tell as JSON. It runs in forks that are told what ``torchrun`` tells its processes, or, where that
is what a test is about, in every process of a real ``torchrun`` or ``accelerate launch``.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from tests import forked

ROOT = Path(__file__).parents[2]
LIMIT = 480
"""Seconds that the processes may take; below pytest's own limit, so that their logs are seen."""

_GRACE = 10
_MOST_LOG = 12_000

Launcher = Callable[[int], list[str]]


def torchrun(processes: int) -> list[str]:
    """The command line of torchrun on this machine alone, at a port that is free."""
    place = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "--local-addr",
        "127.0.0.1",
    ]
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [*module, "--nnodes", "1", "--nproc-per-node", str(processes), *place]


def accelerate(processes: int) -> list[str]:
    """The command line of ``accelerate launch``, which runs several processes on a CPU as well."""
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    many = ["--multi_gpu", "--main_process_ip", "127.0.0.1", "--main_process_port", "0"]
    module = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*module, "--num_processes", str(processes), *many, *plain]


class LaunchError(AssertionError):
    """The processes failed, or ran out of time; the message ends with what they logged."""


def launch(
    worker: str,
    folder: Path,
    *,
    processes: int = 2,
    launcher: Launcher | None = None,
    limit: float = LIMIT,
    fails: bool = False,
    **more: str,
) -> list[Any]:
    """Run ``worker`` in several processes and return what each of them tells, by rank.

    Args:
        worker: ``module:function``, the module inside this folder.
        folder: Handed to every process, for the files of the test.
        processes: How many.
        launcher: What starts them; without one they are forks, which are there at once.
        limit: Seconds until they are ended and the test fails.
        fails: Whether they are expected to end with an error; None stands for what a process that
            did not come to its end has told.
        **more: Variables that the processes get.

    Raises:
        LaunchError: They ended with an error although they should not, the other way round, or
            not in time.
    """
    with tempfile.TemporaryDirectory(prefix="launch-") as name:
        told = Path(name)
        variables = environment(limit) | more | {"TEST_FOLDER": str(folder)}
        with tempfile.TemporaryFile("w+") as output:
            process = _start(worker, told, processes, launcher, variables, output)
            try:
                code = process.wait(limit + _GRACE)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process, told)
            output.seek(0)
            log = output.read()
        if code is None or (code != 0) != fails:
            said = f"not finished after {limit:g} s" if code is None else f"exit code {code}"
            raise LaunchError(f"{worker} in {processes} processes: {said}\n{log[-_MOST_LOG:]}")
        return [_told(told, rank) for rank in range(processes)]


def _start(
    worker: str,
    told: Path,
    processes: int,
    launcher: Launcher | None,
    variables: dict[str, str],
    output: IO,
) -> subprocess.Popen | forked.Process:
    streams: dict[str, Any] = {"env": variables, "stdout": output, "stderr": subprocess.STDOUT}
    if launcher is None:
        ranks = "tests.distributed.entry:ranks"
        return forked.Process(ranks, worker, str(told), processes, **streams)
    return subprocess.Popen(
        [*launcher(processes), "-m", "tests.distributed.entry", worker, str(told)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        **streams,
    )


def environment(limit: float = LIMIT) -> dict[str, str]:
    """What the processes of a launch have in common."""
    ours = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
        "TEST_DEADLINE": str(time.time() + limit),
    }
    # nothing of a launcher that the tests themselves may run under
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in ranks} | ours


def _end(launcher: subprocess.Popen | forked.Process, told: Path) -> None:
    """End the launcher and the processes that it started, which are in sessions of their own."""
    for path in told.glob("pid-*"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(path.read_text()), signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()


def _told(folder: Path, rank: int) -> Any:
    path = folder / f"told-{rank}.json"
    return json.loads(path.read_text()) if path.is_file() else None
