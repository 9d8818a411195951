"""Work in a process of its own that is there at once: a fork of one that has done its imports.

For tests that need a process (one that may be killed, has other settings, or is one of several)
and do not test how Python starts. :mod:`tests.fork_server` is that other process.
"""

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tests.fork_server import send

ROOT = Path(__file__).parents[1]
FOLDER = "FORK_SERVER_OF_THE_TESTS"
"""The variable with the folder of the server's sockets, which all workers of a run share."""


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Have a server for this process and those that it starts."""
    folder = tempfile.mkdtemp(prefix="forks-")
    with open(f"{folder}/log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", folder],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # an interrupt from the keyboard is for whoever asks it
        )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline(), Path(folder, "log").read_text()
    os.environ[FOLDER] = folder
    try:
        yield
    finally:
        del os.environ[FOLDER]
        process.stdin.close()
        process.wait()
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


class Process:
    """A fork at work. It ends when this object does, and with it the processes that it started.

    Attributes:
        pid: Its number, which is that of its process group, too.
        returncode: As in ``subprocess``, once it has been waited for.
    """

    def __init__(
        self,
        function: str,
        *arguments: Any,
        stage: str = "transformers",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: int | IO = subprocess.DEVNULL,
        stdout: int | IO | None = None,
        stderr: int | IO | None = None,
    ):
        """Start.

        Args:
            function: ``module:name`` of what it calls.
            *arguments: What that is called with, as JSON has it.
            stage: What is imported in it: see ``STAGES``.
            env: Its whole environment; that of this process by default.
            cwd: Its folder; the root of the repository by default.
            stdin: A file, or ``subprocess.DEVNULL``.
            stdout: A file; this process's by default.
            stderr: Likewise, or ``subprocess.STDOUT``.
        """
        self.returncode: int | None = None
        self._folder = Path(os.environ[FOLDER])
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(str(self._folder / stage))
        request = {
            "function": function,
            "arguments": arguments,
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or ROOT),
        }
        with open(os.devnull, "rb") as nothing:
            first = nothing.fileno() if stdin == subprocess.DEVNULL else _number(stdin)
            second = 1 if stdout is None else _number(stdout)
            third = (
                2 if stderr is None else second if stderr == subprocess.STDOUT else _number(stderr)
            )
            send(self._server, request, [first, second, third])
        self.pid = self._read()

    def _read(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            if not (more := self._server.recv(1)):
                log = self._folder / "log"
                raise RuntimeError(f"the fork server has ended:\n{log.read_text()}")
            line += more
        return int(line)

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code, negative where a signal has ended it.

        Raises:
            subprocess.TimeoutExpired: It has not ended after so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = self._read()
            self._server.close()
        return self.returncode

    def kill(self) -> None:
        """End it and the processes that it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _number(file: int | IO) -> int:
    return file if isinstance(file, int) else file.fileno()


def run(
    function: str, *arguments: Any, timeout: float = 480, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Call a function in a fork and return what became of it.

    Args:
        function: See :class:`Process`, as for the rest.
        *arguments: What it is called with.
        timeout: Seconds that it may take.
        **options: Of :class:`Process`, but for the streams.

    Raises:
        subprocess.TimeoutExpired: It took longer, and has been ended.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = Process(function, *arguments, stdout=out, stderr=err, **options)

        def said() -> tuple[str, str]:
            return _all(out), _all(err)

        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.wait()
            error.stdout, error.stderr = (text.encode() for text in said())
            raise
        return subprocess.CompletedProcess([function, *arguments], code, *said())


def run_code(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the text of a program, with its command line, as :func:`run` does a function."""
    return run("tests.fork_server:script", code, *arguments, **options)


def run_file(path: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that is a file, likewise."""
    return run("tests.fork_server:file", str(path), *arguments, **options)


def _all(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only what it leaves for whoever waits for it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or since
        return not Path("/proc/self").is_dir()
    return stat.rpartition(")")[2].split()[0] != "Z"


def await_end(pid: int) -> None:
    """Return when there is no such process; the limit of the test is how long it may take."""
    while is_running(pid):
        time.sleep(0.01)
