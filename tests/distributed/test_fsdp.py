"""Two processes that share one model by PyTorch's fully_shard: trained, saved and loaded as one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import hf_lora
from tests.distributed import fsdp_worker as worker
from tests.distributed.launch import launch
from tests.distributed.oracle import assert_peft_reads
from tests.integrations import training

RUNS = ["before", "after", "head before", "head after", "bfloat16"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the trained models, and what the two processes say of them."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, launch("fsdp_worker:training_runs", folder)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, name: str
):
    folder, told = trained
    exact = {"rtol": 2e-2, "atol": 2e-3} if name == "bfloat16" else {"rtol": 1e-5, "atol": 1e-7}
    _, losses, first = worker.one(tmp_path, name)
    assert told[0][name]["losses"] == pytest.approx(
        losses, rel=1e-3 if name == "bfloat16" else 1e-5
    )
    torch.testing.assert_close(load_file(folder / name / "gradients.safetensors"), first, **exact)
    assert told[0][name]["sum"] == told[1][name]["sum"]
    assert told[0][name]["base kept"] is told[1][name]["base kept"] is True
    assert told[0][name]["written"] == ["adapter_config.json", "adapter_model.safetensors"]
    here, there = training.saved(tmp_path / "end"), training.saved(folder / name / "end")
    assert {k: (v.shape, v.dtype) for k, v in here.items()} == {
        k: (v.shape, v.dtype) for k, v in there.items()
    }
    if name != "bfloat16":
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_saved_at_the_start_is_byte_for_byte_one_processes(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, name: str
):
    worker.one(tmp_path, name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        there = trained[0] / name / "begin" / file
        assert (tmp_path / "begin" / file).read_bytes() == there.read_bytes()


def test_what_is_wrapped_before_is_sharded_and_after_is_not(
    trained: tuple[Path, list[dict[str, Any]]],
):
    told = trained[1][0]
    assert {name: told[name]["sharded"] for name in RUNS} == {
        "before": "DTensor",
        "after": "Parameter",
        "head before": "DTensor",
        "head after": "Parameter",
        "bfloat16": "DTensor",
    }


@pytest.mark.parametrize(
    "name",
    ["accumulated", "checkpointed, reentrant=True", "checkpointed, reentrant=False"],
)
def test_late_gradients_are_the_mean_over_all_rows(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path, name: str
):
    _, _, first = worker.one(tmp_path, "after")
    theirs = load_file(trained[0] / f"{name}.safetensors")
    torch.testing.assert_close(theirs, first, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("processes", [3, 4])
def test_parts_may_be_empty_and_meshes_have_two_dimensions(tmp_path: Path, processes: int):
    told = launch("fsdp_worker:meshes", tmp_path, processes=processes)
    assert told == [{"before": True, "after": True}] * processes
    alone = worker.wrap(training.llama())
    hf_lora.save(alone, tmp_path / "alone")
    rows = worker.IDS.repeat(3, 1)
    alone(input_ids=rows, labels=rows).loss.backward()
    for name in told[0]:
        theirs = load_file(tmp_path / name / "gradients.safetensors")
        torch.testing.assert_close(theirs, worker.gradients(alone), rtol=1e-5, atol=1e-7)
        for file in training.files(tmp_path / "alone"):
            there = tmp_path / name / file
            assert (tmp_path / "alone" / file).read_bytes() == there.read_bytes()


@pytest.mark.parametrize("name", ["before", "after", "head before"])
def test_peft_reads_what_two_processes_saved(trained: tuple[Path, list[dict[str, Any]]], name: str):
    assert_peft_reads(trained[0] / name / "end", worker.logits)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of what was saved, and what the two processes say of loading it."""
    folder = tmp_path_factory.mktemp("states")
    return folder, launch("fsdp_worker:states", folder)


def test_a_sharded_model_loads_what_one_process_has(states: tuple[Path, list[dict[str, Any]]]):
    for told in states[1]:
        assert told["one has the file"] is True
        assert told["restored"] is True
        assert told["broadcast"] is True


def test_a_file_that_is_nowhere_or_for_another_base_is_refused_everywhere(
    states: tuple[Path, list[dict[str, Any]]],
):
    for told in states[1]:
        assert told["nobody has it"] != "none"
        assert told["other base"].startswith("BaseMismatchError")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_way_of_saving_leaves_the_same_adapter(
    states: tuple[Path, list[dict[str, Any]]], tmp_path: Path
):
    folder, told = states
    own = training.saved(folder / "own")
    assert len(own) == len(told[0]["full"]) == 14
    assert training.same(training.saved(folder / "full"), own)
    assert training.same(training.saved(folder / "by all"), own)
    alone = worker.wrap(training.llama(), seed=9, targets=[*worker.LORA["targets"], "lm_head"])
    parts = {key: torch.empty_like(alone.state_dict()[key]) for key in told[0]["full"]}
    dcp.load(parts, checkpoint_id=folder / "parts", no_dist=True)
    alone.load_state_dict(parts, strict=False)
    hf_lora.save(alone, tmp_path)
    assert training.same(training.saved(tmp_path), own)


def test_what_would_be_lost_or_wrong_is_refused_in_every_process(
    states: tuple[Path, list[dict[str, Any]]],
):
    for rank, told in enumerate(states[1]):
        refused = told["refused"]
        assert refused["unwrap"].startswith("StateError: Another library has changed these layers")
        assert refused["merge"].startswith("TargetError: These layers cannot be merged into")
        assert refused["view"].startswith("StateError: This model is spread over several")
        assert refused["write"].startswith("SaveError")
        assert ("Process 0 could not save" in refused["write"]) is (rank == 1)
        assert refused["a part"].startswith("StateError: These adapter tensors are not whole")
        assert told["still"] is True
        assert told["with another"] is told["without it"] is True
        assert told["unwrapped after"] == ["Linear"]
    assert not (states[0] / "part").exists()
