"""Adapter files that are wrong: one error that names what, and model and folder as they were."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import (
    AdapterMismatchError,
    BaseMismatchError,
    ConfigError,
    StateError,
    TargetError,
)
from tests import tiny
from tests.files import edit
from tests.files.refusing import refuse

Q0 = "base_model.model.layers.0.q_proj"


class TestTensors:
    """Promise 3: every tensor lands, every slot is filled, with the right shape, finite."""

    def test_other_widths(self, pefts: Path):
        class Wide(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.ModuleList(tiny.Block() for _ in range(2))
                for layer in self.layers:
                    layer.q_proj = nn.Linear(16, 8)

        refuse(
            pefts,
            "layers.0.q_proj: the adapter is for in, out = (8, 8), the layer has (16, 8)",
            "layers.1.q_proj",
            error=AdapterMismatchError,
            model=Wide(),
        )

    def test_more_layers_than_the_file_has(self, pefts: Path):
        refuse(
            pefts,
            "layers.2.q_proj is a target, but has no tensors",
            error=AdapterMismatchError,
            model=tiny.Net(layers=3),
        )

    def test_fewer_layers_than_the_file_has(self, pefts: Path):
        refuse(
            pefts,
            "layers.1.q_proj: the model has no such module",
            error=AdapterMismatchError,
            model=tiny.Net(layers=1),
        )

    def test_another_model(self, pefts: Path):
        model = nn.Sequential(nn.Linear(4, 4))
        refuse(pefts, "the model has no such module", error=AdapterMismatchError, model=model)

    def test_a_missing_tensor(self, pefts: Path):
        edit.change_tensors(pefts, lambda t: t.pop(f"{Q0}.lora_B.weight"))
        refuse(pefts, "layers.0.q_proj has lora_A but not its partner")

    def test_a_missing_layer(self, pefts: Path):
        for name in "AB":
            edit.change_tensors(pefts, lambda t, n=name: t.pop(f"{Q0}.lora_{n}.weight"))
        refuse(pefts, "layers.0.q_proj is a target, but has no tensors")

    def test_no_tensor_at_all(self, pefts: Path):
        edit.change_tensors(pefts, dict.clear)
        refuse(pefts, "there is no lora_A and no lora_B in it")

    @pytest.mark.parametrize("name", ["head.weight", "head.lora_C.weight", "other"])
    def test_an_extra_tensor(self, pefts: Path, name: str):
        edit.change_tensors(
            pefts, lambda t: t.update({f"base_model.model.{name}": torch.ones(3, 8)})
        )
        refuse(pefts, f"base_model.model.{name}", error=AdapterMismatchError)

    def test_an_extra_layer(self, pefts: Path):
        def add(tensors: edit.Tensors) -> None:
            tensors["base_model.model.head.lora_A.weight"] = torch.ones(2, 8)
            tensors["base_model.model.head.lora_B.weight"] = torch.ones(3, 2)

        edit.change_tensors(pefts, add)
        refuse(pefts, "head has tensors, but is no target")

    @pytest.mark.parametrize(
        "other", ["layers.0.q_proj.lora_A.weight", f"{Q0}.lora_A.default.weight", f"{Q0}.lora_A"]
    )
    def test_the_same_tensor_under_two_names(self, pefts: Path, other: str):
        edit.change_tensors(pefts, lambda t: t.update({other: t[f"{Q0}.lora_A.weight"].clone()}))
        refuse(pefts, other, "are the same tensor twice")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_numbers_that_are_not_finite(self, pefts: Path, value: float):
        edit.change_tensors(pefts, lambda t: t[f"{Q0}.lora_B.weight"].view(-1)[3].fill_(value))
        refuse(pefts, "not finite", f"{Q0}.lora_B.weight")

    def test_numbers_too_large_for_the_type_they_get(self, pefts: Path):
        """1e300 is finite in the file, in float64, but not in the float32 of the layer."""

        def enlarge(tensors: edit.Tensors) -> None:
            large = tensors[f"{Q0}.lora_A.weight"].double()
            large[0, 0] = 1e300
            tensors[f"{Q0}.lora_A.weight"] = large

        edit.change_tensors(pefts, enlarge)
        refuse(pefts, "not finite", f"{Q0}.lora_A.weight")

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
    def test_factors_that_are_no_floats(self, pefts: Path, dtype: torch.dtype):
        key = f"{Q0}.lora_A.weight"
        edit.change_tensors(pefts, lambda t: t.update({key: torch.ones(2, 8).to(dtype)}))
        refuse(pefts, f"layers.0.q_proj has lora_A of type {str(dtype).removeprefix('torch.')}")

    @pytest.mark.parametrize("shape", [(16,), (), (3, 8), (0, 8), (2, 0)])
    def test_factors_that_do_not_fit_each_other(self, pefts: Path, shape: tuple[int, ...]):
        key = f"{Q0}.lora_A.weight"
        edit.change_tensors(pefts, lambda t: t.update({key: torch.ones(shape)}))
        refuse(pefts, f"layers.0.q_proj has lora_A {shape}", "do not fit")

    def test_every_problem_is_named_at_once(self, pefts: Path):
        def spoil(tensors: edit.Tensors) -> None:
            tensors["base_model.model.nowhere.weight"] = torch.ones(1)
            tensors["base_model.model.head.weight"] = torch.ones(5, 8)
            for key in list(tensors):
                if ".layers.1.q_proj." in key:
                    tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)

        edit.change_tensors(pefts, spoil)
        refuse(pefts, "layers.7.q_proj", "nowhere.weight", "shape (5, 8), in the model (3, 8)")

    def test_a_second_adapter_that_does_not_fit_leaves_the_first(self, pefts: Path):
        model = tiny.adapted()
        expected = tiny.answers(model)
        edit.change_tensors(pefts, lambda t: t[f"{Q0}.lora_B.weight"].fill_(float("nan")))
        refuse(pefts, "not finite", model=model, adapter="second")
        assert hf_lora.active_adapters(model) == ("default",)
        assert torch.equal(tiny.answers(model), expected)


class TestPlaces:
    """What is not a folder with an adapter, and names that would lead somewhere else."""

    def test_nothing_there(self, tmp_path: Path):
        refuse(tmp_path / "none", "is not a folder")
        (tmp_path / "file").write_text("x")
        refuse(tmp_path / "file", "is not a folder")
        (tmp_path / "empty").mkdir()
        refuse(tmp_path / "empty", "it has: nothing")

    @pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "x.pkl"])
    def test_a_pickle_is_never_opened(self, ours: Path, name: str):
        (ours / edit.WEIGHTS).rename(ours / name)
        refuse(ours, "pickle", "can run code")

    def test_a_pickle_under_the_right_name(self, ours: Path):
        torch.save({"x": torch.ones(1)}, ours / edit.WEIGHTS)
        refuse(ours, "no safetensors file")

    def test_an_adapter_inside_is_named(self, tmp_path: Path):
        tiny.saved(tmp_path / "fr")
        refuse(tmp_path, "its folders do: 'fr'")

    def test_no_json_beside_foreign_weights(self, pefts: Path):
        (pefts / edit.CONFIG).unlink()
        refuse(pefts, "adapter_config.json is missing")

    def test_a_pipe_is_not_waited_for(self, pefts: Path):
        (pefts / edit.CONFIG).unlink()
        os.mkfifo(pefts / edit.CONFIG)
        refuse(pefts, "no ordinary file")
        (pefts / edit.WEIGHTS).unlink()
        os.mkfifo(pefts / edit.WEIGHTS)
        refuse(pefts, "holds no adapter_model.safetensors")

    def test_a_device_is_not_read(self, pefts: Path):
        (pefts / edit.CONFIG).unlink()
        (pefts / edit.CONFIG).symlink_to("/dev/zero")
        refuse(pefts, "no ordinary file")

    @pytest.mark.parametrize("subfolder", ["..", "../adapter", "a/../../b", "/etc", ".", "a\0b"])
    def test_a_subfolder_outside(self, ours: Path, subfolder: str):
        refuse(ours, "ubfolder", subfolder=subfolder)

    @pytest.mark.parametrize(
        "name", ["a.b", "a/b", "../a", "", "-a", "é", "a" * 65, "a\n", 3, None]
    )
    def test_an_adapter_name(self, ours: Path, name: Any):
        refuse(ours, "cannot be called", error=ConfigError, adapter=name)
        model = tiny.adapted()
        with pytest.raises(ConfigError):
            hf_lora.add_adapter(model, name, targets="q_proj")

    @pytest.mark.parametrize(
        "name",
        [
            "../../../etc/passwd",
            "layers.0.q_proj.__class__",
            "__class__.__init__.__globals__",
            "layers.-1.q_proj",
            "layers.0.q_proj\x00",
            "layers.0.q_proj\n",
            "x" * 600,
            "",
            ".",
            "...",
        ],
    )
    def test_a_key(self, pefts: Path, name: str):
        def rename(tensors: edit.Tensors) -> None:
            for which in "AB":
                tensor = tensors.pop(f"{Q0}.lora_{which}.weight")
                tensors[f"base_model.model.{name}.lora_{which}.weight"] = tensor

        edit.change_tensors(pefts, rename)
        refuse(pefts)


class TestModel:
    """The model is not the one, or not in a state, for the adapter."""

    def test_the_wrong_base(self, ours: Path):
        message = refuse(ours, "check_base=False", error=BaseMismatchError, model=tiny.Net(seed=1))
        assert all(f"layers.{n}.{p}" in message for n in (0, 1) for p in ("q_proj", "v_proj"))
        hf_lora.load(tiny.Net(seed=1), ours, check_base=False)

    def test_one_wrong_layer_is_enough(self, ours: Path):
        model = tiny.Net()
        with torch.no_grad():
            model.layers[1].v_proj.weight.mul_(1.05)
        message = refuse(ours, "layers.1.v_proj", error=BaseMismatchError, model=model)
        assert "layers.0" not in message

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_the_right_base_in_another_type(self, ours: Path, dtype: torch.dtype):
        hf_lora.load(tiny.Net().to(dtype), ours)

    def test_a_model_without_weights(self, ours: Path):
        with torch.device("meta"):
            model = tiny.Net()
        refuse(ours, "on the meta device", error=StateError, model=model)

    def test_a_name_that_is_taken(self, ours: Path):
        refuse(ours, "has an adapter 'default' already", error=StateError, model=tiny.adapted())

    def test_a_layer_that_another_adapter_trains_in_full(self, ours: Path):
        model = tiny.adapted(targets=["v_proj"], train=["q_proj"])
        refuse(ours, "q_proj", error=TargetError, model=model, adapter="second")

    def test_a_layer_that_is_never_called(self, tmp_path: Path):
        """nn.MultiheadAttention reads its output layer's weight: an adapter there does nothing."""
        attention = nn.MultiheadAttention(8, 2)
        tiny.saved(tmp_path)

        def rename(tensors: edit.Tensors) -> None:
            factors = [tensors[f"{Q0}.lora_{which}.weight"] for which in "AB"]
            tensors.clear()
            for which, tensor in zip("AB", factors, strict=True):
                tensors[f"base_model.model.0.out_proj.lora_{which}.weight"] = tensor

        edit.change_tensors(tmp_path, rename)
        edit.change_config(tmp_path, target_modules=["out_proj"])
        refuse(tmp_path, "without calling it", model=nn.Sequential(attention))

    def test_a_replaced_forward(self, ours: Path):
        model = tiny.Net()
        layer = model.layers[0].q_proj
        layer.forward = lambda x: x
        refuse(ours, "forward of this Linear was replaced", model=model)

    def test_a_layer_that_cannot_be_trained_through(self, ours: Path):
        """For inference it will do; to train on it would change nothing below it."""

        class Inference(nn.Module):
            def __init__(self, linear: nn.Linear):
                super().__init__()
                self.in_features, self.out_features = linear.in_features, linear.out_features
                self.weight, self.bias = linear.weight, linear.bias

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                with torch.no_grad():
                    return nn.functional.linear(x, self.weight, self.bias)

        model = tiny.Net()
        model.layers[1].q_proj = Inference(model.layers[1].q_proj)
        refuse(ours, "layers.1.q_proj", "gradient", error=TargetError, model=model, trainable=True)
        hf_lora.load(model, ours)
        assert torch.equal(tiny.answers(model), tiny.answers(tiny.adapted()))
