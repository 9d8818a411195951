"""Folders with a sound adapter, for tests to put a fault into."""

from pathlib import Path

import pytest

import hf_lora
from tests import tiny
from tests.files import edit


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A folder with a sound adapter of ours."""
    tiny.saved(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def pefts(ours: Path) -> Path:
    """The same folder as PEFT would have written it, without our part of the header."""
    edit.as_pefts(ours)
    hf_lora.load(tiny.Net(), ours)
    return ours
