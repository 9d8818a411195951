"""Trainer in two processes by DDP, by from_pretrained's sharding and by accelerate's FSDP2.

Each does what one process does, leaves the same checkpoint, and goes on from the others'. On CPUs
accelerate puts a model into DDP although FSDP is asked for, so its path is entered by force; the
code that runs then is its own. FSDP1 runs on accelerators only and is not tried.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import hf_lora
from tests.distributed import fsdp_worker, trainer_worker
from tests.distributed.launch import launch
from tests.distributed.trainer_worker import KINDS, RESUMED
from tests.integrations import training

AROUND = {
    "ddp": "DistributedDataParallel",
    "native": "FSDPLlamaForCausalLM",
    "plugin": "FSDPLlamaForCausalLM",
    "plugin in parts": "FSDPLlamaForCausalLM",
    "plugin from the first": "FSDPLlamaForCausalLM",
}
STATES = {"optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[float]]:
    """The folder of all runs, what the first process tells, and the losses of one process alone."""
    folder = tmp_path_factory.mktemp("ways")
    training.llama().save_pretrained(folder / "base")
    alone, _ = trainer_worker.run(folder, "alone", "alone")
    losses = [log["loss"] for log in alone.state.log_history if "loss" in log]
    first, second = launch("trainer_worker:all_ways", folder)
    assert first == second
    return folder, first, losses


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_training_is_that_of_one_process(ran: Any, kind: str):
    folder, told, losses = ran
    assert told[kind]["around"] == AROUND[kind]
    assert told[kind]["losses"] == pytest.approx(losses, rel=1e-5)
    here, there = (training.saved(folder / name / "checkpoint-4") for name in (kind, "alone"))
    assert here.keys() == there.keys()
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_checkpoint_holds_the_adapter_and_nothing_of_the_base(ran: Any, kind: str):
    states = set() if kind == "native" else STATES  # Trainer keeps no more for such models
    weights = training.CHECKPOINT - {"rng_state.pth", "optimizer.pt", "scheduler.pt"}
    assert set(ran[1][kind]["files"]) == weights | states


def test_adapters_are_sharded_with_the_model_or_kept_whole(ran: Any):
    assert {kind: ran[1][kind]["factors"] for kind in KINDS} == {
        "ddp": "Parameter",
        "native": "Parameter",
        "plugin": "DTensor",
        "plugin in parts": "DTensor",
        "plugin from the first": "DTensor",
    }


@pytest.mark.parametrize(("kind", "source"), RESUMED)
def test_each_goes_on_from_the_others_checkpoints(ran: Any, kind: str, source: str):
    folder, told, _ = ran
    name = f"{kind} after {source}"
    assert told[name] is True  # the optimizer began with what the checkpoint says
    here, there = (training.saved(folder / name / "checkpoint-4") for name in (name, "alone"))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["ddp", "plugin", "plugin in parts"])
def test_one_process_goes_on_from_the_checkpoints_of_two(ran: Any, source: str):
    folder, _, _ = ran
    checkpoint = folder / source / "checkpoint-2"
    name = f"alone after {source}"
    with pytest.warns(hf_lora.HfLoRAWarning, match="of a run of 2 processes"):
        _, state = trainer_worker.run(folder, "alone", name, checkpoint)
    assert trainer_worker.agree(state, checkpoint)
    here, there = (training.saved(folder / name / "checkpoint-4") for name in (name, "alone"))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["ddp", "plugin", "plugin in parts", "plugin from the first"])
def test_the_same_way_resumes_to_the_bit(ran: Any, source: str):
    folder, _, _ = ran
    name = f"{source} after {source}"
    here, there = (training.saved(folder / name / "checkpoint-4") for name in (name, source))
    assert training.same(here, there)


@pytest.mark.parametrize("kind", ["native", "plugin"])
def test_the_best_is_loaded_at_the_end(ran: Any, kind: str):
    assert ran[1][f"best {kind}"] == {"equal": True, "checkpoint": "checkpoint-2"}


@pytest.mark.parametrize("kind", ["native", "plugin in parts"])
def test_peft_reads_every_checkpoint(ran: Any, kind: str):
    checkpoint = ran[0] / kind / "checkpoint-4"
    theirs = peft.PeftModel.from_pretrained(training.llama(), checkpoint)
    ours = hf_lora.load(training.llama(), checkpoint)
    torch.testing.assert_close(
        fsdp_worker.logits(ours), fsdp_worker.logits(theirs), rtol=1e-5, atol=1e-5
    )


def test_an_adapter_comes_with_a_base_that_is_sharded_at_load_time(ran: Any):
    told = ran[1]["from_pretrained"]
    assert told["sharded"] == "DTensor"
    assert told["off by"] < 1e-5


def test_accelerate_itself_ignores_fsdp_on_a_cpu(ran: Any):
    """The reason for the force above; once this fails, the force can go."""
    asked = ran[1]["asked for FSDP"]
    assert asked["around"] == "DistributedDataParallel"
    assert asked["files"] == ran[1]["ddp"]["files"]
