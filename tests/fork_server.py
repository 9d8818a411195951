"""A process that has imported what is slow to import, and forks a child for each piece of work.

Started by :mod:`tests.forked`, which is what tests use. It has stages, each a socket and a list of
modules. Nothing is imported before the first request; what only a later stage needs is imported in
a fork, so that the children of an earlier one do not find it.

A fork has the thread that forked, and the locks that all threads held: so no stage computes
anything, and where a second thread has been started the next fork is refused.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.entry import UNUSED

THREADS = Path("/proc/self/task")
_SIZE = 8


@dataclass(frozen=True)
class Stage:
    """What the children of a stage find imported, and what they cannot import."""

    modules: Sequence[str]
    blocked: Sequence[str] = ()


STAGES = {
    # Nothing that reads a setting of the Hub: huggingface_hub takes its endpoint and its folders
    # from the environment when it is imported, and children with a Hub of their own do that.
    "torch": Stage(
        [
            "torch._dynamo",
            "torch.distributed.fsdp",
            "torch.distributed.tensor",
            "filelock",
            "fsspec",
            "httpx2",
            "jinja2",
            "rich.console",
            "rich.progress",
            "safetensors.torch",
            "tokenizers",
            "tqdm.auto",
            "typer.testing",
            "yaml",
        ]
    ),
    # All but DeepSpeed, which changes the process that imports it.
    "transformers": Stage(
        [
            "tests.distributed.precision_worker",
            "tests.distributed.tp_worker",
            "tests.distributed.trainer_worker",
            "torch.distributed.checkpoint",
            "transformers.integrations.deepspeed",
        ],
        UNUSED,
    ),
}


def check_threads() -> None:
    """Fail where a fork might wait for a lock that nobody opens any more."""
    if THREADS.is_dir() and (count := len(list(THREADS.iterdir()))) > 1:
        raise RuntimeError(f"no fork from a process with {count} threads: an import computed")


class Server:
    """The first of some stages: its socket, its children, and the stages after it.

    Ends, with all its children, when standard input does, which whoever started it holds open.
    """

    def __init__(self, stages: Sequence[tuple[Stage, socket.socket]]):
        (self._stage, self._listener), *self._later = stages
        self._clients: dict[int, socket.socket] = {}

    def serve(self) -> None:
        """Import what the stage has, and fork until the end."""
        sys.modules.update(dict.fromkeys(self._stage.blocked))  # type: ignore[arg-type]
        for name in self._stage.modules:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # no child collects, or copies, what all of them have
        ended, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        while True:
            later = [listener for _, listener in self._later[:1]]
            watched = [sys.stdin, ended, self._listener, *later, *self._clients.values()]
            ready, _, _ = select.select(watched, [], [])
            if sys.stdin in ready:
                break
            if ended in ready:
                ended.recv(4096)
                self._reap()
            for pid, client in self._clients.items():
                if client in ready:  # it is gone: nobody waits for the child any more
                    _kill(pid)
            if later and later[0] in ready:
                self._begin_the_next()
            if self._listener in ready:
                self._accept()
        for pid in self._clients:
            _kill(pid)

    def _begin_the_next(self) -> None:
        check_threads()
        if os.fork() == 0:
            self._forget()
            Server(self._later).serve()
            os._exit(0)
        self._later[0][1].close()
        self._later = []

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        request, files = _receive(client)
        check_threads()
        pid = os.fork()
        if pid == 0:
            self._forget()
            os._exit(_work(client, request, files))
        for file in files:
            os.close(file)
        self._clients[pid] = client

    def _forget(self) -> None:
        """Let go, in a child, of what is the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (self._listener, *self._clients.values()):
            each.close()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (client := self._clients.pop(pid, None)) is not None:
                with contextlib.suppress(OSError):  # it is gone
                    client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                client.close()


def _kill(pid: int) -> None:
    """End a child and its own children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def send(server: socket.socket, request: dict[str, Any], files: Sequence[int]) -> None:
    """Ask for a child, whose standard streams are the ``files``."""
    body = json.dumps(request).encode()
    socket.send_fds(server, [len(body).to_bytes(_SIZE, "big")], files)
    server.sendall(body)


def _receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, files, _, _ = socket.recv_fds(client, _SIZE, 3)
    with client.makefile("rb") as body:
        return json.loads(body.read(int.from_bytes(head, "big"))), files


def _work(client: socket.socket, request: dict[str, Any], files: list[int]) -> int:
    """Be the process that was asked for; returns its exit code."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    client.sendall(b"%d\n" % os.getpid())
    client.close()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return finished(request["function"], request["arguments"])


def finished(target: str, arguments: Sequence[Any]) -> int:
    """Call ``module:function`` as the last thing that a process does; returns its exit code."""
    module, _, name = target.partition(":")
    try:
        getattr(importlib.import_module(module), name)(*arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()  # os._exit, without which the server's own would run, does not
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def script(code: str, *arguments: str) -> None:
    """Run the text of a program as ``python -c`` does."""
    sys.argv[:] = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def file(path: str, *arguments: str) -> None:
    """Run a program as ``python path`` does."""
    sys.argv[:] = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def main() -> None:
    """Listen below the folder that is the argument, and import nothing before it is needed."""
    listeners = []
    for name in STAGES:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{sys.argv[1]}/{name}")
        listener.listen(64)
        listeners.append(listener)
    print("listening", flush=True)
    ready, _, _ = select.select([sys.stdin, *listeners], [], [])
    if sys.stdin not in ready:
        Server(list(zip(STAGES.values(), listeners, strict=True))).serve()


if __name__ == "__main__":
    main()
