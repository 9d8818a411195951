"""Arithmetic on adapters from a shell: each command is one call of the library."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import hf_lora
from tests.algebra.zoo import saved
from tests.tiny_base import Run, tiny_model


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


def test_extract_makes_an_adapter_of_two_models(run: Run, tmp_path: Path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    options = ["-o", tmp_path / "out", "--rank", 1, "--json"]
    found = json.loads(run("extract", tmp_path / "base", tmp_path / "tuned", *options).stdout)
    assert list(found["layers"]) == ["model.layers.0.mlp.up_proj"]
    assert found["error"] < 1e-4
    hf_lora.load(tiny_model(), tmp_path / "out")


def test_diff_tells_what_differs(run: Run, tmp_path: Path):
    one, other = (saved(tmp_path / str(i), i, ["linear"]) for i in range(2))
    found = json.loads(run("diff", one, other, "--json").stdout)
    assert found == hf_lora.diff(one, other).to_dict()
    assert "to the byte" in run("diff", one, one).stdout


def test_a_refusal_is_said_and_nothing_is_written(run: Run, tmp_path: Path):
    folder = saved(tmp_path / "a", 1, ["linear"])
    said = run("combine", folder, "-o", tmp_path / "out", "--method", "linear", code=1)
    assert "product of two sums" in said.stderr
    assert not (tmp_path / "out").exists()
