"""PyTorch's first FSDP is refused by one error, which names the way, before anything changes."""

from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.integrations import training


def test_each_way_to_meet_it_ends_in_an_error_that_names_fully_shard(tmp_path: Path):
    for told in launch("fsdp1_worker:meeting", tmp_path):
        for name in ("factors", "a head"):
            assert all("torch.distributed.fsdp.fully_shard" in words for words in told[name])
            assert told[f"{name}: as before"] is True
        for words in told["sharded before"]:
            assert "is sharded already" in words
            assert "fsdp_version=2" in words
        assert told["a plain model is its own"] == pytest.approx(told["plain"], rel=1e-5)
    assert training.saved(tmp_path / "second")
