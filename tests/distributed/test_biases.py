"""Two processes train biases as one does under FSDP2, and are told where they cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_lora
from tests.distributed import bias_worker as worker
from tests.distributed.fsdp_worker import IDS, train
from tests.distributed.launch import launch
from tests.integrations import training


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, launch("bias_worker:everything", folder)


@pytest.mark.parametrize("name", ["before", "after"])
def test_two_processes_do_what_one_does(
    two: tuple[Path, list[dict[str, Any]]], tmp_path: Path, name: str
):
    folder, told = two
    one = worker.wrap(worker.base())
    losses = list(train(one, IDS))
    assert sum(each[name][0] for each in told) / 2 == pytest.approx(losses[0], rel=1e-4)
    assert all(each[f"{name} loaded"] for each in told)
    hf_lora.save(one, tmp_path)
    here, there = training.saved(tmp_path), training.saved(folder / name)
    assert any("bias" in key for key in here)
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)


def test_under_tensor_parallelism_biases_are_refused_by_name(
    two: tuple[Path, list[dict[str, Any]]],
):
    for each in two[1]:
        assert "its bias cannot be trained there" in each["split"]["bias"]
        assert "a bias on B cannot follow that" in each["split"]["lora_bias"]


def test_of_a_base_in_parts_each_process_copies_whole_biases(tmp_path: Path):
    launch("bias_worker:partitioned", tmp_path)
    one = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    hf_lora.save(worker.wrap(one), tmp_path / "one")
    here, there = training.saved(tmp_path / "one"), training.saved(tmp_path / "parts")
    assert training.same(here, there)
