"""Promise 9: an adapter that is saved again, anywhere, gives the same bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_lora
from hf_lora.errors import ConfigError
from tests import tiny
from tests.files import edit
from tests.files.refusing import files_in

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, hf_lora
from tests import tiny
model = tiny.adapted(
    targets={"q_proj", "v_proj"},
    overrides={"v_proj": {"r": 3}, "layers.0.q_proj": {"alpha": 9.0}},
    train={"norm", "head"},
)
hf_lora.add_adapter(model, "second", targets={"v_proj", "q_proj"}, r=1, init="gaussian")
tiny.scramble(model)
hf_lora.save(model, sys.argv[1])
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path):
    """With hash seeds that give every set and every mapping of a library another order."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
        )
        for seed in ("1", "2")
    ]
    assert [child.wait() for child in children] == [0, 0]
    first, second = (files_in(tmp_path / seed) for seed in ("1", "2"))
    assert first == second
    assert sorted(first) == [edit.CONFIG, edit.WEIGHTS, *(f"second/{n}" for n in sorted(
        [edit.CONFIG, edit.WEIGHTS]))]  # fmt: skip


def test_loading_and_saving_changes_no_byte(tmp_path: Path):
    overrides = {"v_proj": {"r": 3, "alpha": 1.5, "dropout": 0.25}}
    tiny.saved(tmp_path / "a", overrides=overrides, train=["norm"], rslora=True)
    hf_lora.save(hf_lora.load(tiny.Net(), tmp_path / "a"), tmp_path / "b")
    hf_lora.save(hf_lora.load(tiny.Net(), tmp_path / "b", trainable=True), tmp_path / "c")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b") == files_in(tmp_path / "c")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16", torch.float32])
def test_the_type_of_the_saved_tensors(tmp_path: Path, dtype: str | torch.dtype):
    model = tiny.adapted(train=["head"])
    hf_lora.save(model, tmp_path, dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    tensors = edit.read_tensors(tmp_path)[0]
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}
    again = hf_lora.load(tiny.Net(), tmp_path)
    # in the model they have the type of the base again, and the values that the file has
    base = tiny.Net().state_dict().keys()
    for key, value in again.state_dict().items():
        expected = model.state_dict()[key]
        assert value.dtype == torch.float32
        assert torch.equal(value, expected if key in base else expected.to(wanted).float())
    hf_lora.save(again, tmp_path / "again", dtype=dtype)
    assert edit.read_tensors(tmp_path / "again")[0].keys() == tensors.keys()
    first, second = (folder / edit.WEIGHTS for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dtype", ["int8", "float64", "red", torch.int32, 3])
def test_a_type_in_which_no_adapter_is_kept(tmp_path: Path, dtype):
    with pytest.raises(ConfigError, match="is not one of float32, bfloat16, float16"):
        hf_lora.save(tiny.adapted(), tmp_path / "x", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_our_files_are_what_the_format_is(tmp_path: Path):
    """Sorted names, one header that other readers take, and JSON that a human can read."""
    tiny.saved(tmp_path)
    tensors, metadata = edit.read_tensors(tmp_path)
    assert sorted(metadata) == ["format", "hf_lora", "hf_lora_sha256"]
    assert metadata["format"] == "pt"
    header, data = edit.read_header(tmp_path)
    assert list(header) == ["__metadata__", *sorted(tensors)]
    assert (len((tmp_path / edit.WEIGHTS).read_bytes()) - len(data)) % 8 == 0
    text = (tmp_path / edit.CONFIG).read_text()
    assert text.endswith("}\n")
    assert list(edit.read_config(tmp_path)) == sorted(edit.read_config(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [edit.CONFIG, edit.WEIGHTS]
