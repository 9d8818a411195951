"""A process that merges in children of its own, and kills each at another moment."""

import json
import shutil
from pathlib import Path

import torch
import transformers as hf

import hf_lora
from tests.files.killing import die_before, in_child, was_killed

CHANGES = ("open", "fsync", "replace", "unlink", "mkdir", "pwrite", "copy_file_range", "truncate")


def merge_until(base: str, adapter: str, output: Path, step: int) -> bool:
    """Merge in a process that ends before its so-many-th change; say whether it did."""

    def work() -> None:
        die_before(step, CHANGES)
        hf_lora.merge_checkpoint(base, adapter, output, resume=step % 2 == 0)

    return was_killed(in_child(work))


def loads(folder: Path) -> bool:
    try:
        hf.AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kill_at_every_moment(base: str, adapter: str, folder: str) -> None:
    """Kill a merge before each of its changes of the disk in turn, and look at what is left."""
    torch.set_num_threads(1)
    around = Path(folder)
    output = around / "out"
    hf.logging.set_verbosity_error()
    hf_lora.merge_checkpoint(base, adapter, output)  # imports what it needs, for all children
    whole = contents(output)
    shutil.rmtree(output)
    step, resumed = 1, 0
    while merge_until(base, adapter, output, step):
        left = list(around.iterdir())
        assert output not in left, step
        assert not any(map(loads, left)), step
        if step % 5 == 0:
            hf_lora.merge_checkpoint(base, adapter, output, resume=True)
            assert contents(output) == whole, step
            assert list(around.iterdir()) == [output], step
            shutil.rmtree(output)
            resumed += 1
        step += 1
    assert contents(output) == whole
    print(json.dumps({"steps": step, "resumed": resumed}))
