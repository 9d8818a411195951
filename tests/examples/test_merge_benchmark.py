"""The benchmark of merging files: what it merges is exact, and it leaves nothing behind."""

from pathlib import Path

import pytest
import torch

from examples.benchmarks import merge_files

TINY = {"hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "vocab": 128}


def test_what_it_merges_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(merge_files, "SHAPES", TINY)
    found = merge_files.measure(tmp_path, 2, 3, 1, ["cp", "hf_lora"], torch.bfloat16)
    assert found["exact"]["equal"] > 0.999
    assert found["exact"]["places_away"] <= 1
    assert found["peak_mib"]["hf_lora"] > found["peak_mib"]["cp"]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
