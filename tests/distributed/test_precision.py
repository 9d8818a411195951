"""Two processes: checkpointed activations, 16-bit compute, weights that only one of them has.

The oracle is one process with all rows in the same precision.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import precision_worker as worker
from tests.distributed.launch import launch
from tests.integrations import training

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all runs with Trainer, and what the first process tells."""
    folder = tmp_path_factory.mktemp("precision")
    training.llama().save_pretrained(folder / "base")
    first, second = launch("precision_worker:by_trainer", folder)
    assert first == second
    return folder, first


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all runs with fully_shard, and what the first process tells."""
    folder = tmp_path_factory.mktemp("raw")
    first, second = launch("precision_worker:raw", folder)
    assert first.pop("other base") == "BaseMismatchError"  # told by the one that has the base
    assert second.pop("other base") == "none"
    assert first == second
    return folder, first


def check(found: Tensors, expected: Tensors, coarse: bool) -> None:
    """Compare gradients: closely in float32, by their size in bfloat16.

    bfloat16 has 8 bits, so that a rounding is off by up to 2⁻⁹ of the number. A gradient of two
    layers passes some twenty roundings, which other row counts make fall otherwise; were they all
    to add up it would be 20 · 2⁻⁹ of the gradient's norm, and they are as often up as down.
    """
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32, name
        if coarse:
            off = (found[name] - gradient).norm()
            assert off <= 20 * 2**-9 * gradient.norm(), name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


KINDS = ["ddp", "native", "plugin"]
TRAINED = [f"{kind}, {way}" for kind in KINDS for way in worker.WAYS]
MORE = ["plugin checkpoints", "plugin checkpoints bf16", "plugin from the first"]


@pytest.mark.parametrize("name", [*TRAINED, *MORE])
def test_two_processes_train_as_one_does(
    ran: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
):
    folder, told = ran
    coarse = "bf16" in name
    (tmp_path / "base").symlink_to(folder / "base")
    fields = worker.BF16 if coarse else {}
    one = worker.train(tmp_path, "alone", "alone", **fields)
    expected = load_file(tmp_path / "alone" / "gradients.safetensors")
    check(load_file(folder / name / "gradients.safetensors"), expected, coarse)
    assert told[name]["losses"] == pytest.approx(one["losses"], rel=2**-9 if coarse else 1e-5)
    assert told[name]["around"] == (
        "DistributedDataParallel" if name.startswith("ddp") else "FSDPLlamaForCausalLM"
    )
    assert ("CheckpointWrapper" in told[name]["block"]) is ("checkpoints" in name)
    here = training.saved(tmp_path / "alone" / "checkpoint-2")
    there = training.saved(folder / name / "checkpoint-2")
    assert {k: (v.shape, v.dtype) for k, v in there.items()} == {
        k: (v.shape, torch.float32) for k, v in here.items()
    }
    if not coarse:
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
    files = training.files(folder / name / "checkpoint-2")
    assert not any("model" in file for file in files - {"adapter_model.safetensors"})


RAW = [
    "wrapped, checkpointed, sharded",
    "checkpointed, wrapped, sharded",
    "sharded, wrapped, checkpointed",
    "bf16 autocast",
    "bf16 autocast, checkpointed",
    "bf16 policy",
    "bf16 policy, wrapped after",
    "bf16 policy, checkpointed",
    "empty, wrapped, sharded",
    "empty, sharded, wrapped",
    "empty, checkpointed",
    "one has all",
    "one has all and loads",
]


@pytest.mark.parametrize("name", RAW)
def test_fully_shard_computes_what_one_process_does(
    raw: tuple[Path, dict[str, Any]], tmp_path: Path, name: str
):
    folder, told = raw
    loss, expected = worker.alone(tmp_path, name)
    coarse = "bf16" in name
    check(load_file(folder / name / "gradients.safetensors"), expected, coarse)
    assert told[name]["loss"] == pytest.approx(loss, rel=2**-8 if coarse else 1e-5)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        own = (folder / name / file).read_bytes()
        if "policy" not in name or "json" in file:  # where the base's fingerprint is another
            assert (tmp_path / file).read_bytes() == own, file
        assert "json" not in file or (folder / name / "full" / file).read_bytes() == own
    own = training.saved(folder / name)
    assert all(t.dtype == torch.float32 for t in own.values())
    assert training.same(training.saved(folder / name / "full"), own)
    assert training.same(training.saved(tmp_path), own)
