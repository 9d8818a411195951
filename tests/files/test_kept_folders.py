"""What an older hf_lora has saved loads for ever, with the outputs that it had."""

import json
from pathlib import Path

import pytest
import torch

import hf_lora
from tests import tiny
from tests.files.kept_folders import ANSWERS, FOLDERS, KEPT, answers_of

SETS = sorted(path.name for path in KEPT.iterdir())


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kept", SETS)
def test_it_loads_and_answers_as_it_did(kept: str, folder: str, tmp_path: Path):
    source = KEPT / kept / folder
    expected = json.loads((source / ANSWERS).read_text())
    model = tiny.Net()
    for name in expected:
        where = source if name == "default" else source / name
        hf_lora.load(model, where, adapter=name)
    found = answers_of(model)
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(rows))
    # and it can be saved by this hf_lora, and loaded again
    hf_lora.save(model, tmp_path)
    again = tiny.Net()
    for name in expected:
        where = tmp_path if name == "default" else tmp_path / name
        hf_lora.load(again, where, adapter=name)
    assert answers_of(again) == found


def test_sets_are_kept():
    """The folders are found at all: an empty list would pass the test above."""
    assert {"2319176", "80587e6"} <= set(SETS)
    assert all({*FOLDERS} <= {p.name for p in (KEPT / name).iterdir()} for name in SETS)
