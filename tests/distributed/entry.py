"""The first lines of every process of a distributed test: its limit, its work, what it tells.

Run as ``python -m tests.distributed.entry module:function folder`` by torchrun or accelerate; see
launch.py for what stands in the folder and the environment.
"""

import faulthandler
import importlib
import json
import os
import sys
from pathlib import Path

# Optional packages that transformers and accelerate import when they are there: half of the time
# that such a process takes to start, and no test here needs one.
UNUSED = ("peft", "bitsandbytes", "torchao", "datasets", "scipy", "sklearn", "pandas")


def main() -> None:
    """Call the function and leave what it returns in ``told-RANK.json``."""
    target, folder = sys.argv[1], Path(sys.argv[2])
    rank = os.environ.get("RANK", "0")
    pid = folder / f"pid-{rank}"
    pid.write_text(str(os.getpid()))
    # a process that hangs says where, and ends by itself
    faulthandler.dump_traceback_later(float(os.environ["TEST_LIMIT"]), exit=True)
    for name in UNUSED:
        sys.modules[name] = None  # type: ignore[assignment]
    module, _, function = target.partition(":")
    work = getattr(importlib.import_module(f"tests.distributed.{module}"), function)
    told = work(Path(os.environ["TEST_FOLDER"]))
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    pid.unlink()


if __name__ == "__main__":
    main()
