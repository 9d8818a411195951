"""Processes that share one model by transformers' tensor parallelism, and do what one does."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import hf_lora
from tests.distributed import tp_worker as worker
from tests.distributed.launch import launch
from tests.integrations import training
from tests.rounding import assert_rounded_alike

EXACT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
FILES = ("adapter_model.safetensors", "adapter_config.json")
Told = tuple[Path, list[dict[str, Any]]]


def prepared(folder: Path) -> Path:
    """Leave the bases, and adapters that one process made, for the others to load."""
    worker.write_bases(folder)
    for name, dropout in {"alone": 0.1, "exact": 0.0}.items():
        model = hf_lora.wrap(worker.base(), **worker.EVERYWHERE, dropout=dropout)
        worker.scramble(model)
        hf_lora.save(model, folder / name)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The folder of what two processes left, and what they say of it."""
    folder = prepared(tmp_path_factory.mktemp("two"))
    return folder, launch("tp_worker:everything", folder)


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The same of four processes, two by two."""
    folder = prepared(tmp_path_factory.mktemp("meshes"))
    return folder, launch("tp_worker:meshes", folder, processes=4)


def alone(folder: Path, name: str = "alone") -> Any:
    """The adapter that the processes loaded, on one process."""
    return hf_lora.load(worker.base(), folder / name, trainable=True)


def written(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """What the processes wrote down."""
    return load_file(folder / f"{name}.safetensors")


def test_training_is_that_of_one_process(two: Told):
    folder, told = two
    one = worker.wrap(worker.base())
    losses = list(worker.train(one, worker.IDS))
    for each in told:
        assert each["losses"] == pytest.approx(losses, rel=1e-5)
        assert each["sum"] == told[0]["sum"]
        assert each["kinds"] == ["DTensor"]
    ours = training.in_file_names(one)
    torch.testing.assert_close(training.saved(folder / "end"), ours, rtol=1e-4, atol=1e-5)


def test_what_is_saved_at_the_start_is_byte_for_byte_one_processes(two: Told, tmp_path: Path):
    hf_lora.save(worker.wrap(LlamaForCausalLM.from_pretrained(two[0] / "base")), tmp_path)
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (two[0] / "begin" / file).read_bytes()


def test_counts_are_of_whole_tensors_and_norms_too(two: Told):
    one = worker.wrap(worker.base())
    plan = hf_lora.plan(worker.base(), **worker.LORA)
    for _ in worker.train(one, worker.IDS):
        pass
    summary = hf_lora.summary(one)
    for told in two[1]:
        assert told["plan"] == [plan.base_parameters, plan.parameters]
        assert told["summary"] == [summary.base_parameters, summary.adapters[0].parameters]
        assert told["norms"] == pytest.approx(summary.adapters[0].norms, rel=1e-4)


def test_a_file_of_one_process_gives_its_outputs(two: Told):
    logits = worker.logits(alone(two[0]))
    torch.testing.assert_close(written(two[0], "logits")["logits"], logits, **EXACT)


@pytest.mark.parametrize(
    ("name", "compute"),
    [
        ("gradients", worker.first_gradients),
        ("accumulated", worker.accumulated),
        ("checkpointed", worker.checkpointed),
    ],
)
def test_gradients_are_those_of_one_process_dropout_included(two: Told, name: str, compute: Any):
    expected = compute(alone(two[0]))
    assert all(gradient.abs().max() > 1e-4 for gradient in expected.values())
    torch.testing.assert_close(written(two[0], name), expected, **EXACT)


def test_gradients_are_clipped_by_the_norm_of_all(two: Told):
    norm, _ = worker.clipped_step(alone(two[0]))
    for told in two[1]:
        assert told["norm"] == pytest.approx(norm, rel=1e-5)
        assert told["norm"] > 2 * worker.CLIP


def test_an_optimizers_state_goes_on_in_one_process_and_in_two(two: Told):
    folder, told = two
    assert [each["resumed"] for each in told] == [True, True]
    one = alone(folder)
    _, optimizer = worker.clipped_step(one)
    theirs = torch.load(folder / "optimizer.pt", weights_only=True)
    ours = optimizer.state_dict()
    assert theirs["state"].keys() == ours["state"].keys()
    for index, state in ours["state"].items():
        torch.testing.assert_close(theirs["state"][index], state, **EXACT)
    optimizer.load_state_dict(theirs)


def test_layers_that_were_not_split_train_beside_those_that_were(two: Told, tmp_path: Path):
    folder, told = two
    base = LlamaForSequenceClassification.from_pretrained(folder / "classifier")
    one = hf_lora.wrap(base, **worker.IN_FULL)
    _, exact = worker.classify(copy.deepcopy(one).double())
    loss, gradients = worker.classify(one)
    assert any("score" in name for name in gradients)
    assert any("norm.lora_copy" in name for name in gradients)
    assert_rounded_alike((written(folder, "classifier-gradients"), gradients, exact))
    for each in told:
        assert each["classifier"] == pytest.approx(loss, rel=1e-5)
        assert each["classifier, merged"] < 1e-5
    hf_lora.save(one, tmp_path)
    stepped = training.saved(folder / "classifier-stepped")
    torch.testing.assert_close(stepped, training.saved(tmp_path), rtol=1e-4, atol=1e-5)


def test_peft_reads_what_two_processes_saved(two: Told):
    end = two[0] / "end"
    theirs = worker.logits(peft.PeftModel.from_pretrained(worker.base(), end))
    torch.testing.assert_close(worker.logits(hf_lora.load(worker.base(), end)), theirs, **EXACT)
    assert not torch.allclose(theirs, worker.logits(worker.base()), atol=1e-3)


def test_adapters_are_added_switched_and_deleted(two: Told):
    folder, told = two
    one = hf_lora.load(worker.base(), folder / "alone")
    hf_lora.load(one, folder / "late" / "late", adapter="late")
    hf_lora.activate(one, ["default", "late"])
    torch.testing.assert_close(
        written(folder, "both")["logits"], worker.logits(one), rtol=1e-5, atol=1e-5
    )
    with hf_lora.no_adapter(one):
        assert told[0]["tokens"] != worker.generated(one)
    for each in told:
        assert each["tokens"] == worker.generated(one)
        assert each["no_adapter"] is True
        assert each["deleted"] is True


def test_split_weights_are_merged_with_split_updates(two: Told):
    folder, told = two
    one = hf_lora.merge(hf_lora.load(worker.base(), folder / "alone"))
    merged = written(folder, "merged")
    for name, weight in one.named_parameters():
        torch.testing.assert_close(merged[name], weight.detach(), **EXACT)
    for each in told:
        assert each["merged"] < 1e-5
        assert each["unmerged"] is True
        assert each["baked"] is True
    baked = LlamaForCausalLM.from_pretrained(folder / "baked")
    torch.testing.assert_close(worker.logits(baked), worker.logits(one), rtol=1e-5, atol=1e-5)


def test_unwrapping_gives_back_the_split_model(two: Told):
    for told in two[1]:
        assert told["unwrapped"] == [True, True]
        assert told["view"].startswith("StateError: This model is spread over several processes")


def test_styles_that_adapters_cannot_follow_are_refused_all_at_once(two: Told):
    for told in two[1]:
        refused = told["refused"]
        for layer in (0, 1):
            for place, style in (("mlp.gate", "packed_colwise"), ("self_attn.v", "replicate")):
                line = f"model.layers.{layer}.{place}_proj: tensor parallelism has split it"
                assert f"{line} in the style {style!r}" in refused["styles"]
                assert f"{line} in the style {style!r}" in refused["file"]
        assert refused["styles"].startswith("TargetError")
        assert "exclude it" in refused["styles"]
        assert "q_proj: tensor" not in refused["styles"]
        assert refused["file"].startswith("AdapterMismatchError")
        assert "lm_head cannot be trained in full: tensor" in refused["in full"]
        assert "'embedding_rowwise'" in refused["embedding"]
        assert told["as it was"] is True


def test_what_others_split_is_refused(two: Told):
    for told in two[1]:
        native, stages = (told["refused"][name] for name in ("native", "stages"))
        assert native.startswith("TargetError")
        assert native.count("_proj: PyTorch's parallelize_module has split it") == 2
        assert "DistributedConfig(tp_size=...)" in native
        assert stages.startswith("StateError: Pipeline parallelism has left this process some")


def test_whole_factors_stay_equal_where_masks_differ(two: Told):
    first, second = (told["apart"] for told in two[1])
    assert len(first) == 15
    assert first == second


def test_trainer_does_not_train_so_on_a_cpu_and_says_it_itself(two: Told):
    for told in two[1]:
        assert told["refused"]["trainer"].startswith("ValueError: ParallelismConfig is only compat")


def test_two_parts_of_two_shards_do_what_one_process_does(meshes: Told, tmp_path: Path):
    folder, told = meshes
    one = worker.wrap(LlamaForCausalLM.from_pretrained(folder / "base"))
    hf_lora.save(one, tmp_path)
    for file in FILES:
        assert (tmp_path / file).read_bytes() == (folder / "begin" / file).read_bytes()
    losses = list(worker.train(one, worker.IDS))
    exact = alone(folder, "exact")
    gradients = worker.first_gradients(exact)
    torch.testing.assert_close(written(folder, "gradients"), gradients, **EXACT)
    norm, _ = worker.clipped_step(alone(folder, "exact"))
    for each in told:
        assert each["losses"] == pytest.approx(losses, rel=1e-5)
        assert each["sum"] == told[0]["sum"]
        assert each["norm"] == pytest.approx(norm, rel=1e-5)
        assert each["merge"].startswith("TargetError: These layers cannot be merged into")
        assert not any("LoRA" in name for name in each["unwrapped"])
    ours = training.in_file_names(one)
    torch.testing.assert_close(training.saved(folder / "end"), ours, rtol=1e-4, atol=1e-5)
