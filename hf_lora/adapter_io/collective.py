"""What several processes do together when a model is spread over them: write once, read the same.

A model that is not spread is never waited for: each process saves and loads it by itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from hf_lora.compat.dtensor import has_distributed_parameters
from hf_lora.errors import HfLoRAError, SaveError
from hf_lora.files.atomic import temporary_folder
from hf_lora.files.commit_note import PENDING_FILE
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.opened import content

_FILES = (WEIGHTS_FILE, CONFIG_FILE, PENDING_FILE)


def is_main_process() -> bool:
    """Say whether this process is the first of all, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def write_on_main(write: Callable[[], None], *, here: bool) -> None:
    """Have one process or some write, and the others wait until it is done.

    Args:
        write: What writes.
        here: Whether this process does.

    Raises:
        SaveError: A process could not; it is raised in every process.
    """
    fault: Exception | None = None
    try:
        if here:
            write()
    except Exception as error:  # the others must not wait for a process that has given up
        fault = error
    faults = from_all(None if fault is None else f"{fault}")
    if fault is not None:
        raise fault
    for rank, text in enumerate(faults):
        if text is not None:
            raise SaveError(f"Process {rank} could not save the adapter: {text}")


@contextlib.contextmanager
def share_folder(model: nn.Module, find: Callable[[], Path]) -> Iterator[Path]:
    """Hand out the adapter folder that ``find`` returns.

    For a model that is spread over processes, one on whose machine it is not gets a copy from one
    that has it.

    Raises:
        HfLoRAError: What ``find`` raised, if no process has found a folder.
    """
    if not has_distributed_parameters(model):
        yield find()
        return
    folder, fault, files = None, None, None
    try:
        folder = find()
    except (HfLoRAError, OSError) as error:
        fault = error
    have = from_all(folder is not None and (folder / WEIGHTS_FILE).is_file())
    if all(have) or not any(have):
        if folder is None:
            assert fault is not None
            raise fault
        yield folder
        return
    source = have.index(True)
    if dist.get_rank() == source:
        assert folder is not None
        files = {name: content(folder / name) for name in _FILES if (folder / name).exists()}
    sent = [files]
    dist.broadcast_object_list(sent, src=source)
    if have[dist.get_rank()]:
        assert folder is not None
        yield folder
        return
    with temporary_folder("The adapter's files, sent by another process, found no room") as copy:
        for name, data in (sent[0] or {}).items():
            (copy / name).write_bytes(data)
        yield copy


def from_all(value: Any) -> list[Any]:
    """Return what each process hands in, by rank; all of them must call this."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
