"""Threads that compute groups of rows, and one that brings files to the disk meanwhile."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

_MOST = 8
_own = threading.local()

Result = TypeVar("Result")


class Workers:
    """A thread for each core, each of which computes alone.

    While they work PyTorch's own threads rest: groups of rows are too small to be shared, and what
    waits for its share keeps a core busy.
    """

    def __enter__(self) -> Self:
        """Start."""
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        count = max(1, min(_MOST, len(_cores())))
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *error: object) -> None:
        """End, and give PyTorch back its threads."""
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def each(self, work: Callable[[int], Result], groups: Iterable[int]) -> list[Result]:
        """Return what comes of the work on each group, in order."""
        return list(self._pool.map(work, groups))


class Flushing:
    """A thread in which a file is flushed to the disk, one at a time."""

    def __init__(self, then: Callable[[str, Any], None]):
        """Prepare.

        Args:
            then: Called, in the thread that asks for the flush, with the name and what else was
                given when a file is on the disk.
        """
        self._then = then
        self._waiting: tuple[Future[None], str, Any] | None = None

    def __enter__(self) -> Self:
        """Start."""
        self._pool = ThreadPoolExecutor(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for the last one; what is on the disk counts, also after an error elsewhere."""
        try:
            self._finish()
        finally:
            self._pool.shutdown()

    def flush(self, path: Path, name: str, found: Any) -> None:
        """Flush a file; return as soon as the one before it is on the disk."""
        self._finish()
        self._waiting = self._pool.submit(_flush, path), name, found

    def _finish(self) -> None:
        if self._waiting is not None:
            future, name, found = self._waiting
            self._waiting = None
            future.result()
            self._then(name, found)


def memory(name: str, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a flat tensor that this thread uses again and again: new ones would cost more."""
    store: dict[tuple[str, torch.dtype], torch.Tensor] = vars(_own).setdefault("tensors", {})
    held = store.get((name, dtype))
    if held is None or held.numel() < count:
        held = store[name, dtype] = torch.empty(count, dtype=dtype)
    return held if held.numel() == count else held[:count]


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cores() -> set[int]:
    found = getattr(os, "sched_getaffinity", None)
    return found(0) if found is not None else set(range(os.cpu_count() or 1))
