"""``ties`` and ``dare`` against the published rules, on dense updates in their own bases."""

from pathlib import Path

import numpy as np
import pytest
import torch

import hf_lora
from tests.algebra.zoo import deltas, saved

NAMES = ["linear", "turned", "conv"]


def dense_ties(parts: list[torch.Tensor], density: float) -> torch.Tensor:
    """Align dense updates by SVDs of these side by side and one upon another; then TIES."""
    shape = parts[0].shape
    flat = [part.flatten(1).numpy() for part in parts]
    rank = np.linalg.matrix_rank(np.hstack(flat), tol=1e-8)
    across = np.linalg.matrix_rank(np.vstack(flat), tol=1e-8)
    u = np.linalg.svd(np.hstack(flat), full_matrices=False)[0][:, :rank]
    v = np.linalg.svd(np.vstack(flat), full_matrices=False)[2][:across].T
    trimmed = []
    for each in flat:
        core = u.T @ each @ v
        keep = max(1, int(density * core.size))
        least = np.sort(np.abs(core), axis=None)[-keep]
        trimmed.append(np.where(np.abs(core) >= least, core, 0))
    stack = np.stack(trimmed)
    elected = np.sign(stack.sum(0))
    agree = (np.sign(stack) == elected) & (elected != 0)
    merged = np.where(agree, stack, 0).sum(0) / np.maximum(agree.sum(0), 1)
    return torch.from_numpy(u @ merged @ v.T).view(shape)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_is_the_rule_on_aligned_updates(tmp_path: Path, density: float):
    folders = [saved(tmp_path / str(i), i, NAMES, r=2 + i % 2) for i in range(3)]
    weights = [1.0, 0.5, -1.0]
    made = hf_lora.combine(folders, weights, "ties", density=density)
    made.save(tmp_path / "out")
    each = [deltas(folder) for folder in folders]
    found = deltas(tmp_path / "out")
    for name in found:
        wanted = dense_ties([w * d[name] for w, d in zip(weights, each, strict=True)], density)
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)


def test_ties_asks_neither_for_the_order_nor_for_the_factors(tmp_path: Path):
    folders = [saved(tmp_path / str(i), i, NAMES, r=2) for i in range(2)]
    hf_lora.combine(folders[1:], method="svd", dtype="float32").save(tmp_path / "same")
    for name, pair in {"a": folders, "b": [tmp_path / "same", folders[0]]}.items():
        hf_lora.combine(pair, method="ties", density=0.4).save(tmp_path / name)
    one, other = deltas(tmp_path / "a"), deltas(tmp_path / "b")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_one_adapter_of_which_all_is_kept_is_that_adapter(tmp_path: Path, method: str):
    folder = saved(tmp_path / "a", 1, NAMES)
    hf_lora.combine([folder], method=method, density=1).save(tmp_path / "out")
    wanted, found = deltas(folder), deltas(tmp_path / "out")
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_dare_is_the_sum_on_average_and_the_same_for_a_seed(tmp_path: Path):
    folders = [saved(tmp_path / str(i), i, ["linear"], r=2) for i in range(2)]
    seen = []
    for seed in range(200):
        made = hf_lora.combine(folders, method="dare", density=0.5, seed=seed)
        tensors = {key.rpartition("lora_")[2]: t for key, t in made.data.tensors.items()}
        slot = made.layers["linear"]
        seen.append(tensors["B.weight"] @ tensors["A.weight"] * slot.scaling)
    stack = torch.stack(seen).double()
    wanted = sum(deltas(folder)["linear.weight"] for folder in folders)
    assert isinstance(wanted, torch.Tensor)
    spread = stack.std(0) / len(seen) ** 0.5
    assert bool(((stack.mean(0) - wanted).abs() <= 5 * spread + 1e-6).all())
    again = hf_lora.combine(folders, method="dare", density=0.5, seed=3)
    assert len({t.tobytes() for t in (x.numpy() for x in seen)}) > 100
    other = hf_lora.combine(folders, method="dare", density=0.5, seed=3)
    assert all(torch.equal(other.data.tensors[k], t) for k, t in again.data.tensors.items())


def test_their_error_is_of_a_lower_rank_and_rounding(tmp_path: Path):
    folders = [saved(tmp_path / str(i), i, NAMES, r=3) for i in range(2)]
    whole = hf_lora.combine(folders, method="ties", density=0.5)
    assert whole.error.total < 1e-6
    less = hf_lora.combine(folders, method="ties", density=0.5, rank=2)
    whole.save(tmp_path / "whole")
    less.save(tmp_path / "less")
    one, other = deltas(tmp_path / "whole"), deltas(tmp_path / "less")
    for path in NAMES:
        name = f"{path}.weight"
        lost = float((one[name] - other[name]).norm() / one[name].norm())
        assert less.error.layers[path] == pytest.approx(lost, rel=1e-5)
