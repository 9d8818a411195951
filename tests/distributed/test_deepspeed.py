"""Two processes under DeepSpeed's ZeRO-2 and ZeRO-3, on its CPU accelerator over gloo.

By its engine alone, by Trainer and by accelerate: what one process does, and adapters only in every
checkpoint. Quantized bases, NVMe offloading, ZeRO++ and pipelines are not tried.
"""

import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import hf_lora
from hf_lora.model.registry import registry_of
from tests.integrations import training

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

from tests.distributed import bytes_worker, deepspeed_runs_worker
from tests.distributed import deepspeed_worker as worker
from tests.distributed.launch import launch
from tests.distributed.oracle import assert_peft_reads

EXACT = [name for name in worker.CASES if "bfloat16" not in name]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
BASE_NUMBERS = sum(p.numel() for p in training.llama().parameters())


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of what engines trained and saved, and what the two processes say of it."""
    folder = tmp_path_factory.mktemp("engines")
    training.llama().save_pretrained(folder / "base")
    hf_lora.save(worker.one(folder, "zero3, few rows")[0], folder / "trained")
    hf_lora.save(worker.wrap(training.llama(3)), folder / "foreign")
    return folder, launch("deepspeed_worker:by_engine", folder)


@pytest.fixture(scope="module")
def trained(engines: tuple[Path, list[dict[str, Any]]]) -> tuple[Path, dict[str, Any]]:
    """The folder of the trained models, and what both processes say of them."""
    folder, (first, second) = engines
    assert first["trainings"] == second["trainings"]
    return folder, first["trainings"]


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_do_what_one_does(trained: tuple[Path, dict[str, Any]], name: str):
    folder, told = trained
    model, losses, first = worker.one(folder, name)
    assert told[name]["losses"] == pytest.approx(losses, rel=1e-5)
    theirs = load_file(folder / f"{name}.safetensors")
    torch.testing.assert_close(theirs, first, rtol=1e-5, atol=1e-7)
    here, there = (training.saved(at / name / "end") for at in (folder / "alone", folder))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
    norms = sorted(hf_lora.summary(model).adapters[0].norms.values())
    assert told[name]["norms"] == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("name", EXACT)
def test_what_is_saved_at_the_start_is_byte_for_byte_one_processes(
    trained: tuple[Path, dict[str, Any]], name: str
):
    worker.one(trained[0], name)
    for file in ADAPTER:
        here, there = (trained[0] / at / name / "begin" / file for at in ("", "alone"))
        assert here.read_bytes() == there.read_bytes()


def test_the_cases_are_what_they_are_called(trained: tuple[Path, dict[str, Any]]):
    for name, told in trained[1].items():
        parts = name.startswith("zero3")
        assert told["engine"].endswith("Stage3") is parts, name
        assert told["shapes"] == [[0] if parts else [32, 32], [4, 32]], name


@pytest.mark.parametrize(
    ("name", "dtype"),
    # of what is whole DeepSpeed turns everything into bfloat16; in parts only the base is loaded so
    [("zero2, bfloat16", torch.bfloat16), ("zero3, bfloat16", torch.float32)],
)
def test_bfloat16_is_close(trained: tuple[Path, dict[str, Any]], name: str, dtype: torch.dtype):
    _, losses, _ = worker.one(trained[0], name)
    assert trained[1][name]["losses"] == pytest.approx(losses, rel=1e-2)
    assert {t.dtype for t in training.saved(trained[0] / name / "end").values()} == {dtype}


@pytest.mark.parametrize("name", ["zero2", "zero3, nothing kept", "zero3, head in full"])
def test_peft_reads_what_two_processes_saved(trained: tuple[Path, dict[str, Any]], name: str):
    assert_peft_reads(trained[0] / name / "end", worker.logits)


@pytest.fixture(scope="module")
def states(engines: tuple[Path, list[dict[str, Any]]]) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of what was saved, and what the two processes say of loading it."""
    return engines[0], [each["states"] for each in engines[1]]


def test_a_model_in_parts_loads_what_one_process_has(states: tuple[Path, list[dict[str, Any]]]):
    folder, told = states
    whole = hf_lora.load(training.llama(), folder / "trained")
    expected = worker.logits(whole)[0, 0].tolist()
    for each in told:
        assert each["logits"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert each["frozen"] is True
        assert each["other base"].startswith("BaseMismatchError")
        assert "LoRALinear" not in each["unwrapped"]


def test_a_plan_counts_what_is_in_parts(states: tuple[Path, list[dict[str, Any]]]):
    plan = hf_lora.plan(training.llama(), **worker.LORA)
    expected = [plan.base_parameters, plan.base_bytes, plan.parameters]
    assert [told["plan"] for told in states[1]] == [expected, expected]


def test_only_adapters_are_put_together_to_be_saved(states: tuple[Path, list[dict[str, Any]]]):
    for told in states[1]:
        assert told["gathered"] == [told["trainable"]]
        assert told["trainable"] < BASE_NUMBERS / 10


def test_every_way_of_saving_leaves_the_same_adapter(states: tuple[Path, list[dict[str, Any]]]):
    folder = states[0]
    by_all = training.saved(folder / "by all")
    assert training.same(training.saved(folder / "handed"), by_all)
    assert not training.same(training.saved(folder / "trained"), by_all)
    assert not (folder / "none").exists()


def test_what_would_be_lost_or_wrong_is_refused_in_every_process(
    states: tuple[Path, list[dict[str, Any]]],
):
    expected = {
        "wrap the engine": "StateError: This is a DeepSpeedEngine around a model; wrap the model",
        "add": "StateError: DeepSpeed has been set up with this model, and would never train",
        "restore": "StateError: DeepSpeed's optimizer steps copies of these adapters",
        "nothing gathered": "StateError: save_pretrained was given an empty state dict",
        "own parts": "StateError: These adapter tensors are not whole",
        "merge": "TargetError: These layers cannot be merged into",
        "unwrap": "StateError: Another library has changed these layers",
        "write": "SaveError: ",
    }
    for told in states[1]:
        assert told["merge"].startswith("TargetError: These layers cannot be merged into")
        assert told["view"].startswith("StateError: This model is spread over several processes")
        for name, beginning in expected.items():
            assert told["refused"][name].startswith(beginning), name


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of what Trainer and accelerate left, and what the two processes say of it."""
    folder = tmp_path_factory.mktemp("others")
    training.llama().save_pretrained(folder / "base")
    return folder, launch("deepspeed_runs_worker:by_others", folder)


@pytest.fixture(scope="module")
def runs(others: tuple[Path, list[dict[str, Any]]]) -> tuple[Path, dict[str, Any], list[float]]:
    """The folder of all runs of Trainer, what they tell, and the losses of one process alone."""
    folder, (first, second) = others
    alone = deepspeed_runs_worker.run(folder, "alone", "alone")
    losses = [log["loss"] for log in alone.state.log_history if "loss" in log]
    assert first["trainers"] == second["trainers"]
    return folder, first["trainers"], losses


@pytest.mark.parametrize("kind", deepspeed_runs_worker.KINDS)
def test_trainer_does_what_one_process_does(runs: Any, kind: str):
    folder, told, losses = runs
    assert told[kind]["around"] == "DeepSpeedEngine"
    assert told[kind]["processes"] == 2
    assert told[kind]["weight"] == ([0] if kind == "zero3" else [48, 32])
    assert told[kind]["losses"] == pytest.approx(losses, rel=1e-5)
    here, there = (training.saved(folder / name / "checkpoint-4") for name in (kind, "alone"))
    assert here.keys() == there.keys()
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", deepspeed_runs_worker.KINDS)
def test_trainer_resumes_to_the_bit(runs: Any, kind: str):
    here, there = (
        training.saved(runs[0] / name / "checkpoint-4") for name in (kind, f"{kind} resumed")
    )
    assert training.same(here, there)


@pytest.mark.parametrize("kind", deepspeed_runs_worker.KINDS)
def test_no_checkpoint_holds_anything_of_the_base(runs: Any, kind: str):
    checkpoint = runs[0] / kind / "checkpoint-2"
    assert training.files(checkpoint) > ADAPTER
    _check_states(checkpoint / "global_step2")
    model = hf_lora.load(training.llama(), checkpoint)
    theirs = peft.PeftModel.from_pretrained(training.llama(), checkpoint)
    torch.testing.assert_close(worker.logits(model), worker.logits(theirs), rtol=1e-5, atol=1e-5)


def _check_states(folder: Path) -> None:
    """Check that DeepSpeed's files hold adapters and nothing as large as the base."""
    files = [path for path in folder.iterdir() if "model_states" in path.name]
    assert files
    model = worker.wrap(training.llama())
    adapters = {key for *_, key in registry_of(model).keys("default")}
    for path in files:
        # written a moment ago by this test's own processes
        state = torch.load(path, weights_only=False)
        assert state["module"].keys() == adapters
        shapes = {name for group in state["param_shapes"] for name in group}
        assert shapes == adapters
        assert not state.get("frozen_param_fragments")
    assert max(path.stat().st_size for path in folder.iterdir()) < BASE_NUMBERS * 4 / 2


@pytest.mark.parametrize("kind", deepspeed_runs_worker.KINDS)
def test_trainer_ends_with_the_best(runs: Any, kind: str):
    folder, told, _ = runs
    best = told[f"{kind} best"]
    assert best["checkpoint"] == "checkpoint-2"
    there = training.saved(folder / f"{kind} best" / "checkpoint-2")
    assert best["sum"] == pytest.approx(sum(float(t.double().sum()) for t in there.values()))


@pytest.mark.parametrize("kind", deepspeed_runs_worker.KINDS)
def test_a_checkpoint_of_two_saves_is_refused(runs: Any, kind: str):
    """DeepSpeed's files and the adapter's must be of one moment."""
    said = runs[1][f"{kind} mixed"]
    assert said.startswith("AdapterMismatchError: These adapter tensors are not what")


@pytest.fixture(scope="module")
def loops(others: tuple[Path, list[dict[str, Any]]]) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of accelerate's states, and what the two processes say of them."""
    return others[0], [each["loops"] for each in others[1]]


@pytest.mark.parametrize("kind", deepspeed_runs_worker.KINDS)
def test_accelerate_saves_and_goes_on_from_adapters(
    loops: tuple[Path, list[dict[str, Any]]], kind: str
):
    folder, told = loops
    for each in told:
        assert each[kind]["type"] == "DistributedType.DEEPSPEED"
        assert each[kind]["processes"] == 2
        assert each[kind]["loaded"] is each[kind]["goes on"] is True
        assert set(each[kind]["files"]) > ADAPTER
    _check_states(folder / f"{kind} state" / "pytorch_model")
    assert training.files(folder / f"{kind} model") == ADAPTER
    hf_lora.load(training.llama(), folder / f"{kind} model")


def test_a_step_sends_little_else_than_is_planned(others: tuple[Path, list[dict[str, Any]]]):
    told = others[1][0]["sent"]
    plan = hf_lora.plan(bytes_worker.model_of(False), world=2, **bytes_worker.LORA)
    ways = {each.strategy: each for each in plan.per_rank}
    for name in ("ZeRO-2", "ZeRO-3"):
        adapter, in_full = (sum(counts.values()) for counts in told[name])
        assert adapter == pytest.approx(ways[name].sent, rel=0.05)
        assert in_full == pytest.approx(ways[name].sent_in_full, rel=0.05)
    # half of the gradients, by each of the two
    assert told["ZeRO-3"][0]["_reduce_scatter_base_"] == plan.gradient_bytes // 2
