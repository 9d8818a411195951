"""A model that is larger than the memory that a process may take: trained and merged from disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.distributed.entry import UNUSED
from tests.layers import memory_worker

START = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({UNUSED}))  # half of the time that imports take
runpy.run_module("{memory_worker.__name__}", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts allocations on Linux only")
def test_a_model_larger_than_its_memory_trains_and_merges(tmp_path: Path):
    size = memory_worker.make(tmp_path)
    assert size > 2 * memory_worker.ROOM
    run = subprocess.run(
        [sys.executable, "-c", START, str(tmp_path)],
        # freed memory goes back to the system at once, so that the limit counts what is in use
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert "Cannot allocate memory" in told["whole"]  # the same limit is too low for the whole

    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    plain = memory_worker.work(model, tmp_path / "plain")
    for name in ("loss", "trained", "merged", "unmerged"):
        assert told[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-5), name
    assert told["base"] == plain["base"]
    assert told["unmerged"] == told["trained"]
    assert told["trained"] != pytest.approx(told["base"], rel=1e-2)
