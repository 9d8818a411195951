"""An adapter of 4,000 layers: saved and loaded in a few seconds, and nothing is quadratic.

Measured in calls of Python's functions, which are the same on any machine.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hf_lora
from tests import tiny
from tests.files import edit

LARGE, SMALL = 2_000, 500
"""Blocks; each has two adapted layers."""


def calls(work: Callable[[], object]) -> int:
    """Return how many functions written in Python, and in C, are called."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.fixture(scope="module")
def models() -> dict[int, tiny.Net]:
    # a rank and a strength of its own for every tenth layer: patterns, and many of them
    overrides = {rf"layers\.\d*{n}\.q_proj": {"r": 1, "alpha": n + 1.0} for n in range(5)}
    return {size: tiny.adapted(layers=size, overrides=overrides) for size in (SMALL, LARGE)}


def check(found: dict[int, int]) -> None:
    """Four found the layers take four times as many calls."""
    assert found[LARGE] < 4.4 * found[SMALL]


def test_saving(models: dict[int, tiny.Net], tmp_path: Path):
    check({n: calls(lambda n=n: hf_lora.save(models[n], tmp_path / str(n))) for n in models})


@pytest.mark.parametrize("maker", ["ours", "pefts"])
def test_loading(models: dict[int, tiny.Net], tmp_path: Path, maker: str):
    found = {}
    for size, model in models.items():
        folder = tmp_path / str(size)
        hf_lora.save(model, folder)
        if maker == "pefts":
            edit.as_pefts(folder)
        fresh = tiny.Net(size)
        found[size] = calls(lambda m=fresh, f=folder: hf_lora.load(m, f))
        ours, theirs = (m.layers[-1].v_proj.lora_A for m in (fresh, model))
        assert torch.equal(ours, theirs)
    check(found)


def test_refusing(models: dict[int, tiny.Net], tmp_path: Path):
    """Every layer is wrong, and each is looked at once."""
    found = {}
    for size, model in models.items():
        hf_lora.save(model, tmp_path / str(size))
        edit.as_pefts(tmp_path / str(size), target_modules=["head"])
        fresh = tiny.Net(size)

        def refuse(fresh: tiny.Net = fresh, folder: Path = tmp_path / str(size)) -> None:
            with pytest.raises(hf_lora.AdapterMismatchError):
                hf_lora.load(fresh, folder)

        found[size] = calls(refuse)
    check(found)
