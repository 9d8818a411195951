"""Run by test_launch.py: processes that fail, or never end."""

import os
import time
from pathlib import Path

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def works(folder: Path) -> dict[str, str]:
    """Tell everything that a launcher may have said."""
    theirs = (*NAMES, "ACCELERATE_", "GROUP_", "LOCAL_", "MASTER_", "ROLE_", "TORCH")
    return {name: text for name, text in os.environ.items() if name.startswith(theirs)}


def one_fails(folder: Path) -> None:
    """One process raises while the other waits for it."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise RuntimeError("the second process had enough")
    (folder / "waiting").write_text(str(os.getpid()))
    dist.barrier()


def all_hang(folder: Path) -> None:
    """No process ever ends."""
    (folder / f"hanging-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(3600)
