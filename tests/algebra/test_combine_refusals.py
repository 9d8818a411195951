"""What cannot be combined is refused by name, with the way; what is equal or has a mean is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_lora
from hf_lora.files.read import read_folder
from tests.algebra.zoo import Zoo, deltas, saved, total
from tests.kinds.test_a_third_kind import Shifted
from tests.tiny import Net, scramble


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "linear"}, "product of two sums"),
        ({"method": "ties_svd"}, "'ties' here"),
        ({"method": "dare_linear"}, "here 'dare'"),
        ({"method": "magnitude_prune"}, "how an update is factored"),
        ({"method": "mean"}, "not one of cat, svd, ties, dare"),
        ({"method": 3}, "not one of cat"),
        ({"method": "cat", "rank": 4}, "'cat' keeps every rank"),
        ({"method": "ties"}, "density"),
        ({"method": "dare", "density": 0.0}, "not a share above 0"),
        ({"method": "svd", "density": 0.5}, "svd drops nothing"),
        ({"rank": 0}, "at least 1"),
        ({"rank": True}, "at least 1"),
        ({"rank": 2.0}, "at least 1"),
        ({"energy": 1.5}, "at most 1"),
        ({"energy": float("nan")}, "at most 1"),
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"weights": [1.0, float("inf")]}, "no finite weight"),
        ({"weights": [1.0, "2"]}, "no finite weight"),
        ({"weights": [1.7e308, 1.7e308]}, "so large"),
        ({"weights": [0.0, 0]}, "every weight is zero"),
        ({"dtype": "int8"}, "dtype"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(tmp_path: Path, arguments: dict[str, Any], words: str):
    folders = [saved(tmp_path / name, 1, ["linear"]) for name in "ab"]
    with pytest.raises(hf_lora.ConfigError, match=words):
        hf_lora.combine(folders, **arguments)


def test_nothing_to_combine():
    with pytest.raises(hf_lora.ConfigError, match="no adapter is named"):
        hf_lora.combine([])
    with pytest.raises(hf_lora.ConfigError, match="given twice"):
        hf_lora.combine({"a": 1.0}, [1.0])
    with pytest.raises(hf_lora.ConfigError, match="rank=8, or energy="):
        hf_lora.resize("a")


def test_numbers_that_are_not_finite(tmp_path: Path):
    folder = saved(tmp_path / "a", 1, ["linear"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    tensors[first][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(hf_lora.AdapterFileError, match="not finite"):
        hf_lora.combine([folder])


def test_a_type_that_is_too_small_for_the_result(tmp_path: Path):
    model = hf_lora.wrap(Net(), ["q_proj"], r=1)
    scramble(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1e7)
    hf_lora.save(model, tmp_path / "a")
    hf_lora.combine([tmp_path / "a"], dtype="bfloat16")
    with pytest.raises(hf_lora.ConfigError, match="another dtype"):
        hf_lora.combine([tmp_path / "a"], dtype="float16")


def test_layers_of_other_sizes_or_kinds(tmp_path: Path):
    def other() -> Zoo:
        model = Zoo()
        model.linear = torch.nn.Linear(6, 5)
        model.turned = torch.nn.Conv1d(3, 4, 2)  # type: ignore[assignment]
        return model

    names = ["linear", "turned"]
    folders = [saved(tmp_path / "a", 1, names), saved(tmp_path / "b", 1, names, other)]
    with pytest.raises(hf_lora.AdapterMismatchError) as caught:
        hf_lora.combine(folders, check_base=False)
    assert "linear: the layers" in str(caught.value)
    assert "6 -> 9 and 6 -> 5" in str(caught.value)
    assert "turned" in str(caught.value)
    assert "different kinds" in str(caught.value)


def test_adapters_of_a_part_and_of_the_whole(tmp_path: Path):
    whole = hf_lora.wrap(torch.nn.ModuleDict({"model": Net()}), ["q_proj"], r=2)
    hf_lora.save(whole, tmp_path / "whole")
    hf_lora.save(hf_lora.wrap(Net(), ["q_proj"], r=2), tmp_path / "part")
    with pytest.raises(hf_lora.AdapterMismatchError, match="saved from a part"):
        hf_lora.combine([tmp_path / "whole", tmp_path / "part"])


class TestBases:
    def test_other_weights_are_another_base(self, tmp_path: Path):
        one = saved(tmp_path / "a", 1, ["q_proj"], Net)
        other = saved(tmp_path / "b", 1, ["q_proj"], lambda: Net(seed=1))
        with pytest.raises(hf_lora.BaseMismatchError, match="numbers differ"):
            hf_lora.combine([one, other])
        hf_lora.combine([one, other], check_base=False)

    def test_names_decide_where_there_is_no_fingerprint(self, tmp_path: Path):
        folders = []
        for name in "ab":
            folder = saved(tmp_path / name, 1, ["q_proj"], Net)
            peft_like(folder, base_model_name_or_path=f"me/{name}")
            folders.append(folder)
        with pytest.raises(hf_lora.BaseMismatchError, match=r"'me/a'.*'me/b'"):
            hf_lora.combine(folders)
        assert hf_lora.combine(folders, check_base=False).data.base == "me/a"

    def test_base_and_fingerprint_are_carried_along(self, tmp_path: Path):
        folder = saved(tmp_path / "a", 1, ["q_proj"], Net)
        hf_lora.resize(folder, rank=1).save(tmp_path / "out")
        with pytest.raises(hf_lora.BaseMismatchError):
            hf_lora.load(Net(seed=1), tmp_path / "out")
        hf_lora.load(Net(), tmp_path / "out")


def peft_like(folder: Path, **fields: Any) -> None:
    """Take off what hf_lora wrote into the header, as PEFT's files have none."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(load_file(weights), weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


class TestInFull:
    def test_what_is_equal_is_kept(self, tmp_path: Path):
        folders = [saved(tmp_path / name, 1, ["linear"], train=["head"]) for name in "ab"]
        hf_lora.combine(folders, [1, 1]).save(tmp_path / "out")
        kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
        there = load_file(folders[0] / "adapter_model.safetensors")
        name = next(key for key in there if "head" in key)
        assert torch.equal(kept[name], there[name])
        hf_lora.load(Zoo(), tmp_path / "out")

    @pytest.mark.parametrize(
        "flags",
        [{"train": ["head"]}, {"train_rows": {"embed": [1, 4]}}, {"bias": "all"}],
        ids=["module", "rows", "biases"],
    )
    def test_weights_that_add_up_to_1_make_a_mean(self, tmp_path: Path, flags: dict[str, Any]):
        folders = [saved(tmp_path / str(i), i, ["linear"], **flags) for i in range(2)]
        with pytest.raises(hf_lora.AdapterMismatchError, match="add up to 2"):
            hf_lora.combine(folders)
        with pytest.raises(hf_lora.AdapterMismatchError, match="add up to 0"):
            hf_lora.subtract(*folders)
        with pytest.raises(hf_lora.AdapterMismatchError, match="different numbers"):
            hf_lora.combine(folders, [0.5, 0.5], method="ties", density=0.5)
        made = hf_lora.combine(folders, [0.25, 0.75])
        assert any("means" in line for line in made.told)
        made.save(tmp_path / "out")
        files = [load_file(f / "adapter_model.safetensors") for f in (*folders, tmp_path / "out")]
        for key, value in files[2].items():
            if "lora" not in key:
                torch.testing.assert_close(value, 0.25 * files[0][key] + 0.75 * files[1][key])
        wanted = total([(0.25, deltas(folders[0])), (0.75, deltas(folders[1]))])
        for name, delta in deltas(tmp_path / "out").items():
            torch.testing.assert_close(delta, wanted[name], rtol=1e-6, atol=1e-6)

    def test_what_only_one_has_is_refused(self, tmp_path: Path):
        one = saved(tmp_path / "a", 1, ["linear"], train=["head"])
        other = saved(tmp_path / "b", 1, ["linear"])
        with pytest.raises(hf_lora.AdapterMismatchError) as caught:
            hf_lora.combine([one, other], [0.5, 0.5])
        assert "head.weight" in str(caught.value)
        assert "does not" in str(caught.value)
        hf_lora.combine([one, other], [0.5, 0.0]).save(tmp_path / "out")

    def test_other_rows_are_refused(self, tmp_path: Path):
        one = saved(tmp_path / "a", 1, ["linear"], train_rows={"embed": [1, 4]})
        other = saved(tmp_path / "b", 1, ["linear"], train_rows={"embed": [1, 5]})
        with pytest.raises(hf_lora.AdapterMismatchError, match="rows"):
            hf_lora.combine([one, other], [0.5, 0.5])

    def test_a_module_in_full_in_pefts_file(self, tmp_path: Path):
        one, other = (saved(tmp_path / n, 1, ["linear"], train=["head"]) for n in "ab")
        peft_like(one)
        peft_like(other)
        hf_lora.combine([one, other], [0.5, 0.5]).save(tmp_path / "out")
        assert read_folder(tmp_path / "out").own.trained == ["head"]  # type: ignore[union-attr]
        hf_lora.load(Zoo(), tmp_path / "out")


def test_a_kind_without_factors_is_refused_by_name(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4))
    with hf_lora.register_layer(torch.nn.Embedding, Shifted):
        hf_lora.wrap(model, ["0"], r=1)
        hf_lora.save(model, tmp_path / "a")
        with pytest.raises(hf_lora.AdapterMismatchError, match="toy_left"):
            hf_lora.combine([tmp_path / "a"])
