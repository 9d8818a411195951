"""Rows of tied embeddings on two processes: one tensor, as on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import rows_worker
from tests.distributed.launch import launch
from tests.distributed.test_tied import based
from tests.distributed.tied_worker import KINDS, RESUMED
from tests.integrations import training


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[float]]:
    """The folder of all runs, what the first process tells, and the losses of one process alone."""
    folder = based(tmp_path_factory.mktemp("rows"))
    alone = rows_worker.run(folder, "alone", "alone")
    first, second = launch("rows_worker:all_ways", folder)
    assert first == second
    return folder, first, alone["losses"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_training_is_that_of_one_process(ran: Any, kind: str):
    folder, told, losses = ran
    assert told[kind]["losses"] == pytest.approx(losses, rel=1e-5)
    assert told[kind]["rows"] == ["model.embed_tokens.lora_rows"]
    assert told[kind]["held once"]
    here, there = (training.saved(folder / name / "checkpoint-4") for name in (kind, "alone"))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", RESUMED)
def test_it_resumes_to_the_bit(ran: Any, kind: str):
    here, there = (
        training.saved(ran[0] / name / "checkpoint-4") for name in (kind, f"{kind} again")
    )
    assert training.same(here, there)
