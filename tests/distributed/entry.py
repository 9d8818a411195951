"""The first lines of every process of a distributed test: its limit, its work, what it tells.

Run as ``python -m tests.distributed.entry module:function folder`` by torchrun or accelerate, or
forked by :func:`ranks`; see launch.py for what stands in the folder and the environment.
"""

import faulthandler
import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

# Optional packages that transformers and accelerate import when they are there: half of the time
# that such a process takes to start, and no test here needs one.
UNUSED = ("peft", "bitsandbytes", "torchao", "datasets", "scipy", "sklearn", "pandas")


def main() -> None:
    """Be what a launcher has started: one rank."""
    for name in UNUSED:
        sys.modules[name] = None  # type: ignore[assignment]
    rank(sys.argv[1], Path(sys.argv[2]))


def rank(target: str, folder: Path) -> None:
    """Call the function and leave what it returns in ``told-RANK.json``."""
    number = os.environ.get("RANK", "0")
    pid = folder / f"pid-{number}"
    pid.write_text(str(os.getpid()))
    # a process that hangs says where, and ends by itself
    left = float(os.environ["TEST_DEADLINE"]) - time.time()
    faulthandler.dump_traceback_later(max(left, 1), exit=True)
    module, _, function = target.partition(":")
    work = getattr(importlib.import_module(f"tests.distributed.{module}"), function)
    told = work(Path(os.environ["TEST_FOLDER"]))
    (folder / f"told-{number}.json").write_text(json.dumps(told))
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        # Here and not in the worker, whose models are gone by now: where DDP's reducer is the last
        # to hold the group, it waits for the group's threads and keeps the lock that they need.
        distributed.destroy_process_group()
    pid.unlink()


def ranks(target: str, folder: str, count: int) -> None:
    """Do in a fork of :mod:`tests.fork_server` what torchrun does: start ranks, and wait for them.

    The ranks are forks again, told what torchrun tells; this process has the store they meet in,
    and ends the others when one has failed.
    """
    from torch.distributed import TCPStore

    from tests import fork_server

    importlib.import_module(f"tests.distributed.{target.partition(':')[0]}")  # once, not by each
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    fork_server.check_threads()
    running = set()
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            listener.close()
            os.environ.update(variables(number, count, port))
            os._exit(fork_server.finished(f"{__name__}:rank", [target, Path(folder)]))
        running.add(pid)
    # from here on there are threads
    store = TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status != 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            sys.exit(1)
    del store


def variables(number: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank, on one machine."""
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(number))
    counts = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(count))
    return {
        **ranks,
        **counts,
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "forked",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


if __name__ == "__main__":
    main()
