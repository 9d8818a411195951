"""What a plan says that each process sends and keeps, against what 2 and 4 processes do."""

from typing import Any

import pytest

import hf_lora
from tests.distributed import bytes_worker as worker
from tests.distributed.launch import launch

WORLDS = [2, 4]


def planned(world: int) -> dict[str, Any]:
    """The plan's record of each way."""
    plan = hf_lora.plan(worker.model_of(False), world=world, **worker.LORA)
    return {each.strategy: each for each in plan.per_rank}


@pytest.fixture(scope="module", params=WORLDS)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What is planned for some processes, what one of them sends, and how many they are."""
    folder = tmp_path_factory.mktemp("bytes")
    worker.model_of(False).save_pretrained(folder / "base")
    told = launch("bytes_worker:measure", folder, processes=request.param)
    assert all(each == told[0] for each in told)
    return planned(request.param), told[0], request.param


@pytest.mark.parametrize("strategy", ["DDP", "FSDP2"])
def test_a_step_sends_what_is_planned(measured: Any, strategy: str):
    plan, told, _ = measured
    assert told[strategy] == [plan[strategy].sent, plan[strategy].sent_in_full]


def test_saving_sends_the_adapter_and_a_sample_of_the_base(measured: Any):
    plan, told, world = measured
    saved = told["FSDP2 saved"]
    assert saved.pop("all_gather_into_tensor") == plan["FSDP2"].sent_to_save
    tensors = len(list(worker.model_of(False).parameters()))
    # of each 16 numbers of 4 bytes, all in one sum
    assert saved.pop("allreduce_") <= tensors * 16 * 4 * 2 * (world - 1) // world
    assert saved.pop("allgather_") < 1000  # whether all went well
    assert not saved


def test_tensor_parallelism_sends_for_every_token(measured: Any):
    plan, told, world = measured
    few, many, saved, _ = told["tensor parallel"]
    tokens = worker.ROWS * worker.TOKENS
    each = (many - few) // tokens
    each_step = few - tokens * each
    assert each_step == plan["tensor parallel"].sent
    assert saved == plan["tensor parallel"].sent_to_save
    # q, k and v of the first block read frozen embeddings, which need no gradient
    first = 3 * 2 * 32 * 4 * (world - 1) // world
    assert each == plan["tensor parallel"].sent_per_token - first


@pytest.mark.parametrize("strategy", ["FSDP2", "tensor parallel"])
def test_a_process_keeps_what_is_planned(measured: Any, strategy: str):
    plan, told, _ = measured
    found = told["FSDP2 held"] if strategy == "FSDP2" else told["tensor parallel"][-1]
    each = plan[strategy]
    assert found == [each.weights, each.gradients, each.optimizer]
