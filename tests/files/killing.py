"""Processes that end by SIGKILL in the middle of a save, as nothing can be cleaned up then."""

import os
import signal
from collections.abc import Callable

STEPS = ("open", "fsync", "replace", "unlink", "rmdir", "mkdir")
"""The functions of ``os`` through which a save changes what is on the disk."""


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child and return its process id; the child never comes back."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def die_before(step: int, changes: tuple[str, ...] = STEPS) -> None:
    """Make this process kill itself before its ``step``-th change of the disk of these kinds."""
    left = step

    def counted(original: Callable) -> Callable:
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in changes:
        setattr(os, name, counted(getattr(os, name)))


def was_killed(pid: int) -> bool:
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
