"""What every test runs under: no network, one torch thread, fixed seeds, a time limit.

The environment is set before anything imports torch or huggingface_hub, because both read it once.
"""

import atexit
import contextlib
import gc
import os
import shutil
import socket
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "agg"
# An empty cache of our own: a test must not pass because of what somebody once downloaded.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-lora-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# Collecting tests makes a million objects that stay, and looks at all of them time and again.
gc.disable()

import random

import numpy as np
import pytest
import torch

from tests import forked
from tests import slow as slowness

pytest_plugins = ["tests.folder_fixtures", "tests.hub_fixtures", "tests.without_peft"]

SLOW_TEST_SECONDS = 1800
# Each worker holds torch, transformers, PEFT and its models: one to two gigabytes.
MOST_WORKERS = 8
LOOPBACK = ("127.", "::1", "localhost")


def _refuse_the_network(event: str, args: tuple) -> None:
    """Audit hook: abort a connection or a name look-up that would leave this machine."""
    if event == "socket.connect":
        address = args[1]
        host = address[0] if isinstance(address, tuple) else "localhost"
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    if isinstance(host, bytes):
        host = host.decode()
    if host and not host.startswith(LOOPBACK) and host not in ("0.0.0.0", "::", _HOSTNAME):
        raise RuntimeError(f"a test tried to reach the network: {event} {host!r}")


_HOSTNAME = socket.gethostname()
sys.addaudithook(_refuse_the_network)
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Make our own warnings errors: a test that causes one on purpose says so with `pytest.warns`.

    Not in pyproject.toml: naming the class there would import hf_lora before the lines above ran.
    """
    config.addinivalue_line("filterwarnings", "error::hf_lora.errors.HfLoRAWarning")
    if forked.FOLDER not in os.environ:  # the workers have that of the process that started them
        server = contextlib.ExitStack()
        server.enter_context(forked.serving())
        config.add_cleanup(server.close)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite in a process per core, and files that were named in this process.

    Starting workers takes seconds, and a debugger needs the test in the process that it watches.
    """
    if config.args_source is pytest.Config.ArgsSource.ARGS:
        return 0
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests, and give them their longer limit unless they state one themselves.

    An exhaustive one is slow, too: ``-m "not slow"`` takes the place of ``-m "not exhaustive"``.
    """
    slow = slowness.names()
    for item in items:
        if item.get_closest_marker("exhaustive") or slowness.is_slow(item.nodeid, slow):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TEST_SECONDS))


def pytest_collection_finish() -> None:
    """Leave what is there out of every later collection: libraries ask for one at each step."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
