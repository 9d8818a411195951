"""Tied embeddings that an adapter trains, on two processes: one tensor, as on one process.

FSDP2 takes a shared parameter only if all that share it are sharded together.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import tied_worker
from tests.distributed.launch import launch
from tests.distributed.tied_worker import KINDS, RESUMED
from tests.integrations import training

HEAD, EMBED = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"


def based(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    training.llama(tie_word_embeddings=True).to(dtype).save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[float]]:
    """The folder of all runs, what the first process tells, and the losses of one process alone."""
    folder = based(tmp_path_factory.mktemp("tied"))
    alone = tied_worker.told(tied_worker.run(folder, "alone", "alone"))
    first, second = launch("tied_worker:all_ways", folder)
    assert first == second
    return folder, first, alone["losses"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_training_is_that_of_one_process(ran: Any, kind: str):
    folder, told, losses = ran
    assert told[kind]["losses"] == pytest.approx(losses, rel=1e-5)
    here, there = (training.saved(folder / name / "checkpoint-4") for name in (kind, "alone"))
    assert here.keys() == there.keys()
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
    assert torch.equal(here[HEAD], here[EMBED])


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_has_it_once(ran: Any, kind: str):
    assert ran[1][kind]["copies"] == ["model.embed_tokens.lora_copy_weight"]
    assert ran[1][kind]["held once"]


@pytest.mark.parametrize("kind", RESUMED)
def test_it_resumes_to_the_bit(ran: Any, kind: str):
    here, there = (
        training.saved(ran[0] / name / "checkpoint-4") for name in (kind, f"{kind} again")
    )
    assert training.same(here, there)


def test_a_base_in_16_bits_whose_copies_are_in_32(tmp_path: Path):
    """accelerate looks whether the embeddings' weight is the head's; a cast is a new tensor."""
    folder = based(tmp_path, torch.bfloat16)
    alone = tied_worker.told(tied_worker.run(folder, "alone", "alone"))
    for each in launch("tied_worker:one_way", folder):
        assert each["losses"] == pytest.approx(alone["losses"], rel=1e-3)
        assert each["copies"] == ["model.embed_tokens.lora_copy_weight"]
    saved = training.saved(folder / "plugin" / "checkpoint-4")
    assert torch.equal(saved[HEAD], saved[EMBED])
    assert saved[HEAD].dtype == torch.float32
