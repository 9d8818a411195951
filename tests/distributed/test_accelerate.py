"""Loops of one's own with accelerate: states that hold adapters, one process and two."""

import subprocess
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.files.manifest import MANIFEST_FILE
from tests import forked
from tests.distributed import fsdp_worker
from tests.distributed.accelerate_worker import KINDS, Loop, equal
from tests.distributed.launch import ROOT, environment, launch, torchrun
from tests.integrations import training

ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Loop]:
    """A folder of states, what two processes say of them, and the loop that made one alone."""
    folder = tmp_path_factory.mktemp("states")
    alone = Loop("alone", seed=1)
    alone.train()
    alone.accelerator.save_state(str(folder / "alone"))
    first, second = launch("accelerate_worker:exchange", folder)
    assert first == second
    return folder, first, alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_holds_the_adapter_and_resumes_to_the_bit(exchanged: Any, kind: str):
    told = exchanged[1][kind]
    second = {"ddp": ["model.safetensors"], "fsdp": []}[kind]  # the model that is not wrapped
    randoms = [f"random_states_{rank}.pkl" for rank in (0, 1)]
    assert told["files"] == sorted([*ADAPTER, *second, MANIFEST_FILE, "optimizer.bin", *randoms])
    assert told["loaded"] is True
    assert told["goes on"] is True
    assert (
        told["type"] == {"ddp": "DistributedType.MULTI_CPU", "fsdp": "DistributedType.FSDP"}[kind]
    )


def test_each_kind_loads_the_others_state(exchanged: Any):
    assert exchanged[1]["ddp from fsdp"] is True
    assert exchanged[1]["fsdp from ddp"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_and_two_load_each_others_state(exchanged: Any, kind: str):
    folder, _, alone = exchanged
    for rank in (0, 1):
        there = torch.load(folder / f"{kind} {rank}.pt", weights_only=True)
        assert equal(there, alone.state())
    # one process has the second model beside, as the two under DDP had
    if kind == "ddp":
        loop = Loop("alone", seed=9)
        with pytest.warns(hf_lora.HfLoRAWarning, match="of a run of 2 processes"):
            loop.accelerator.load_state(str(folder / kind))
        assert training.same(training.in_file_names(loop.model), training.saved(folder / kind))


@pytest.mark.parametrize("kind", KINDS)
def test_save_model_writes_what_loads_everywhere(exchanged: Any, kind: str):
    saved = exchanged[0] / f"model of {kind}"
    assert sorted(training.files(saved)) == ADAPTER
    ours = hf_lora.load(training.llama(), saved)
    theirs = peft.PeftModel.from_pretrained(training.llama(), saved)
    torch.testing.assert_close(
        fsdp_worker.logits(ours), fsdp_worker.logits(theirs), rtol=1e-5, atol=1e-5
    )


def test_without_register_accelerate_saves_everything(tmp_path: Path):
    """What register is there for."""
    loop = Loop("alone", seed=1, register=False)
    loop.accelerator.save_state(str(tmp_path))
    assert "adapter_config.json" not in training.files(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 50_000


def test_two_wrapped_models_and_one_that_is_not(tmp_path: Path):
    def prepared(seed: int) -> tuple[accelerate.Accelerator, list[nn.Module]]:
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.free_memory()
        hf_lora.register(accelerator)
        with training.seeded(seed):
            models = [training.wrapped(seed), nn.Linear(2, 2), training.wrapped(seed + 1, r=2)]
        return accelerator, [accelerator.prepare(model) for model in models]

    accelerator, models = prepared(1)
    accelerator.save_state(str(tmp_path))
    again, others = prepared(5)
    again.load_state(str(tmp_path))
    for model, other in zip(models, others, strict=True):
        assert training.same(dict(model.state_dict()), dict(other.state_dict()))
    assert {"model.safetensors", *ADAPTER, f"models/2/{ADAPTER[0]}"} < training.files(tmp_path)


def test_a_state_of_another_adapter_is_refused(tmp_path: Path):
    loop = Loop("alone", seed=1)
    loop.accelerator.save_state(str(tmp_path))
    hf_lora.save(training.wrapped(r=2), tmp_path)
    (tmp_path / MANIFEST_FILE).unlink()  # which would say so at once
    before = training.adapter_tensors(loop.model)
    with pytest.raises(hf_lora.AdapterMismatchError, match="another adapter"):
        loop.accelerator.load_state(str(tmp_path))
    assert training.same(training.adapter_tensors(loop.model), before)


def test_what_is_no_accelerator_or_no_safetensors_is_refused(tmp_path: Path):
    with pytest.raises(hf_lora.ConfigError, match=r"accelerate\.Accelerator of a training loop"):
        hf_lora.register(training.wrapped())
    loop = Loop("alone", seed=1)
    with pytest.raises(hf_lora.StateError, match="safe_serialization=False"):
        loop.accelerator.save_model(loop.model, tmp_path, safe_serialization=False)
    loop.accelerator.save_model(loop.second, tmp_path)
    assert training.files(tmp_path) == {"model.safetensors"}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_example_learns_stops_and_goes_on(tmp_path: Path, processes: int):
    program = ROOT / "examples" / "accelerate_loop.py"
    options = ["--quick", "--cpu"]
    if processes == 1:
        done = forked.run_file(program, *options, env=environment(), cwd=tmp_path)
    else:
        done = subprocess.run(
            [*torchrun(processes), str(program), *options],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=480,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert "base: mnopqrst" in lines
    halfway, resumed = (line for line in lines if line.startswith("with the adapter"))
    assert "resumed: mlkjihgf" in resumed
    losses = [float(line.rpartition(" ")[2]) for line in (halfway, resumed)]
    assert losses[1] < losses[0]
    output = tmp_path / "outputs" / "accelerate_loop"
    assert sorted(training.files(output / "adapter")) == ADAPTER
    assert not [file for file in training.files(output) if "model" in Path(file).stem.split("_")[0]]
