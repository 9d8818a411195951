"""An adapter of 2,000 layers is saved, loaded and refused; and nothing about it is quadratic.

What a call does is counted: a clock would say what else the machine does.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hf_lora
from tests import tiny
from tests.files import edit
from tests.work import calls

LARGE, SMALL, MORE = 400, 100, 1_000
"""Blocks; each has two adapted layers. The work of the first two is compared."""


def adapted(size: int) -> tiny.Net:
    # a rank and a strength of its own for every tenth layer: patterns, and many of them
    overrides = {rf"layers\.\d*{n}\.q_proj": {"r": 1, "alpha": n + 1.0} for n in range(5)}
    return tiny.adapted(layers=size, overrides=overrides)


@pytest.fixture(scope="module")
def models() -> dict[int, tiny.Net]:
    return {size: adapted(size) for size in (SMALL, LARGE)}


def check(work: dict[int, int]) -> None:
    """Four times the layers take four times as much, and a little for the longer numbers."""
    assert work[LARGE] < 4.4 * work[SMALL]
    assert work[LARGE] < 3_000 * 2 * LARGE  # a load has 2,100 calls a layer, on Python 3.11


def test_saving(models: dict[int, tiny.Net], tmp_path: Path):
    check({n: calls(lambda n=n: hf_lora.save(models[n], tmp_path / str(n))) for n in models})


def as_ours(folder: Path) -> None:
    """As it was saved."""


@pytest.mark.parametrize("maker", [as_ours, edit.as_pefts])
def test_loading(models: dict[int, tiny.Net], tmp_path: Path, maker: Callable[[Path], None]):
    work = {}
    for size, model in models.items():
        folder = tmp_path / str(size)
        hf_lora.save(model, folder)
        maker(folder)
        fresh = tiny.Net(size)
        work[size] = calls(lambda m=fresh, f=folder: hf_lora.load(m, f))
        ours, theirs = (m.layers[-1].v_proj.lora_A for m in (fresh, model))
        assert torch.equal(ours, theirs)
    check(work)


def test_refusing(models: dict[int, tiny.Net], tmp_path: Path):
    """Every layer is wrong, and each is looked at once."""
    work = {}
    for size, model in models.items():
        hf_lora.save(model, tmp_path / str(size))
        edit.as_pefts(tmp_path / str(size), target_modules=["head"])
        fresh = tiny.Net(size)

        def refuse(fresh: tiny.Net = fresh, folder: Path = tmp_path / str(size)) -> None:
            with pytest.raises(hf_lora.AdapterMismatchError):
                hf_lora.load(fresh, folder)

        work[size] = calls(refuse)
    check(work)


def test_two_thousand_layers(tmp_path: Path):
    model = adapted(MORE)
    hf_lora.save(model, tmp_path)
    loaded = hf_lora.load(tiny.Net(MORE), tmp_path)
    for ours, theirs in zip(loaded.layers, model.layers, strict=True):
        assert torch.equal(ours.v_proj.lora_B, theirs.v_proj.lora_B)
