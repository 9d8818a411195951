"""Arithmetic on adapters from a shell: each command is one call of the library."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import hf_lora
from tests.algebra.zoo import saved
from tests.tiny_base import Run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_combine_writes_what_the_library_makes(run: Run, tmp_path: Path):
    one, other = (saved(tmp_path / str(i), i, ["linear"]) for i in range(2))
    out = tmp_path / "out"
    options = ["-o", out, "--rank", 3, "--json"]
    found = json.loads(run("combine", f"{one}=0.7", f"{other}=-1", *options).stdout)
    made = hf_lora.combine({one: 0.7, other: -1.0}, rank=3)
    assert found == made.to_dict() | {"directory": str(out), "title": found["title"]}
    assert all(torch.equal(weights(out)[key], t) for key, t in made.data.tensors.items())


def test_resize_says_what_is_lost(run: Run, tmp_path: Path):
    folder = saved(tmp_path / "a", 1, ["linear", "conv"], r=4)
    said = run("resize", folder, "-o", tmp_path / "out", "--energy", 0.5).stdout
    assert "relative error" in said
    assert f"saved to {tmp_path / 'out'}" in said


def test_similarity_compares(run: Run, tmp_path: Path):
    folder = saved(tmp_path / "a", 1, ["linear"])
    assert json.loads(run("similarity", folder, folder, "--json").stdout)["total"] == 1.0


def test_a_refusal_is_said_and_nothing_is_written(run: Run, tmp_path: Path):
    folder = saved(tmp_path / "a", 1, ["linear"])
    said = run("combine", folder, "-o", tmp_path / "out", "--method", "linear", code=1)
    assert "product of two sums" in said.stderr
    assert not (tmp_path / "out").exists()
