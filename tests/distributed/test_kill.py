"""A process killed in the middle of a save: what was saved before still loads and goes on."""

from pathlib import Path

import pytest

import hf_lora
from tests.distributed import fsdp_worker as worker
from tests.distributed.launch import launch
from tests.integrations import training


def test_a_run_goes_on_from_the_checkpoint_before(tmp_path: Path):
    assert launch("kill_worker:trainer_dies", tmp_path, fails=True) == [None, None]
    killed = tmp_path / "killed"
    assert training.checkpoints(killed) == ["checkpoint-2", "checkpoint-4"]
    assert "adapter_model.safetensors" not in training.files(killed / "checkpoint-4")
    with pytest.raises(hf_lora.AdapterFileError):
        hf_lora.load(training.llama(), killed / "checkpoint-4")
    before = training.saved(killed / "checkpoint-2")
    loaded = hf_lora.load(training.llama(), killed / "checkpoint-2")
    assert training.same(training.in_file_names(loaded), before)
    assert launch("kill_worker:trainer_resumes", tmp_path) == [True, True]
    # and the checkpoint that was begun has been finished, with nothing left beside it
    again, whole = (tmp_path / name / "checkpoint-4" for name in ("killed", "whole"))
    assert training.same(training.saved(again), training.saved(whole))
    assert training.files(again) == training.files(whole)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_sharded_model_leaves_the_adapter_before(tmp_path: Path, victim: int):
    told = launch("kill_worker:sharded_dies", tmp_path, fails=True, VICTIM=str(victim))
    assert told == [None, None]
    assert not list(tmp_path.glob("survived-*"))
    first = worker.wrap(training.llama())
    loaded = hf_lora.load(training.llama(), tmp_path / "adapter", trainable=True)
    assert training.same(training.adapter_tensors(loaded), training.adapter_tensors(first))
    assert list(worker.train(loaded, worker.IDS)) == list(worker.train(first, worker.IDS))
