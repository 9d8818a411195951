"""Two data-parallel processes over gloo: one writes, both resume, and the result is one's own."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ddp_worker import COMPARED
from tests.distributed.launch import accelerate, launch
from tests.integrations import training


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes says of its runs."""
    return launch("ddp_worker:resuming", tmp_path_factory.mktemp("ddp"))


def test_there_were_two(told: list[dict[str, Any]]):
    assert [each["processes"] for each in told] == [2, 2]
    assert told[0]["around the model"] == "DistributedDataParallel"


def test_the_checkpoint_holds_the_adapter_once(told: list[dict[str, Any]]):
    states = {"rng_state_0.pth", "rng_state_1.pth"}
    assert set(told[0]["files"]) == (training.CHECKPOINT - {"rng_state.pth"}) | states


def test_both_begin_with_what_the_first_drew(told: list[dict[str, Any]]):
    assert told[0]["drawn"] != told[1]["drawn"]
    assert told[0]["begun with"] == told[1]["begun with"] == told[0]["drawn"]


def test_both_resume_and_end_with_the_best(told: list[dict[str, Any]]):
    for each in told:
        assert each["resumed equal"] is True
        assert each["best equal"] is True


def test_both_have_the_same_adapter(told: list[dict[str, Any]]):
    assert told[0]["sum"] == told[1]["sum"] != 0


def test_no_search_for_unused_parameters(told: list[dict[str, Any]]):
    assert [each["looks for unused"] for each in told] == [False, False]
    assert [each["warnings"] for each in told] == [[], []]


def test_buffers_that_move_are_the_adapters_and_those_of_the_first_process(tmp_path: Path):
    told = launch("ddp_worker:with_moving_buffers", tmp_path)
    for each in told:
        assert each["switched: base"] is each["left alone: base"] is True
        assert each["switched"] == each["left alone"]
        assert each["switched"][1] == 4
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("switched", "left alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "base_model.model.inner.mean" in load_file(files[0])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs that one process repeats, and what the two say of them."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, launch("ddp_worker:comparing", folder, launcher=accelerate)


def one_process(name: str, folder: Path) -> tuple[training.Run, training.Gradients]:
    """The same training in this process: batches of four instead of two times two."""
    fields = dict(COMPARED[name])
    if name == "uneven":
        # what accelerate fills the last step with: rows from the beginning
        rows = fields["train_dataset"]
        fields["train_dataset"] = [*rows, rows[0]]
    gradients = training.Gradients()
    run = training.run(
        folder,
        model=training.wrapped(dropout=0.0),
        callbacks=[gradients],
        per_device_train_batch_size=4,
        **fields,
    )
    return run, gradients


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_do_what_one_does(
    compared: tuple[Path, list[dict[str, Any]]], tmp_path: Path, name: str
):
    folder, told = compared
    run, gradients = one_process(name, tmp_path)
    losses = [log["loss"] for log in run.trainer.state.log_history if "loss" in log]
    assert told[0][name]["losses"] == pytest.approx(losses, rel=1e-5)
    assert len(losses) == 4
    theirs = load_file(folder / name / "gradients.safetensors")
    torch.testing.assert_close(theirs, gradients.kept, rtol=1e-5, atol=1e-7)
    assert len(theirs) == 12
    run.model.save_pretrained(tmp_path / "end")
    here, there = training.saved(tmp_path / "end"), training.saved(folder / name / "end")
    assert here.keys() == there.keys()
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-6)
    assert told[0][name]["sum"] == told[1][name]["sum"]


def test_peft_reads_what_two_processes_saved(compared: tuple[Path, list[dict[str, Any]]]):
    saved = compared[0] / "accumulated" / "end"
    ids = torch.arange(1, 11)[None]
    theirs = peft.PeftModel.from_pretrained(training.llama(), saved).eval()
    ours = training.llama()
    plain = ours.eval()(ids).logits
    ours = training.hf_lora.load(ours, saved).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours(ids).logits, plain, atol=1e-4)
