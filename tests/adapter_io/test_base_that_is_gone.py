"""An adapter whose base is not where it says: the error names both and the way; ``base=`` is it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hf_lora
from tests.adapter_io.test_from_pretrained import MODELS
from tests.files import edit
from tests.oracle.adapting import scramble


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of an adapter, whose base lies beside it."""
    MODELS["causal"]().save_pretrained(tmp_path / "base")
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    hf_lora.wrap(model, targets=["q_proj"], r=2)
    scramble(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def is_it(model: Any, adapter: Path) -> bool:
    tensors, _ = edit.read_tensors(adapter)
    state = model.state_dict()
    names = [
        (key.removeprefix("base_model.model.").removesuffix(".weight"), key) for key in tensors
    ]
    return all(torch.equal(state[name], tensors[key]) for name, key in names)


GONE = {
    "moved": "/somewhere/else/base",
    "another system": "C:\\Users\\someone\\models\\tiny",
    "a network drive": r"\\server\models\tiny",
    "beside the program": "./models/tiny",
    "above it": "../tiny",
    "a home": "~/models/tiny",
    "an id that is nowhere": "nobody/nothing",
    "several folders": "models/llama/tiny",
}


@pytest.mark.parametrize("place", GONE)
def test_the_error_names_adapter_base_and_way(adapter: Path, place: str):
    edit.change_config(adapter, base_model_name_or_path=GONE[place])
    with pytest.raises(hf_lora.BaseLoadError) as caught:
        hf_lora.from_pretrained(adapter)
    for words in (str(adapter), GONE[place], "base model", "base=", "hf_lora.load(model"):
        assert words in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_a_revision_is_named_as_well(adapter: Path):
    edit.change_config(adapter, base_model_name_or_path="nobody/nothing", revision="v9")
    with pytest.raises(hf_lora.BaseLoadError, match="'nobody/nothing' at revision v9"):
        hf_lora.from_pretrained(adapter)


def test_a_folder_that_is_no_model(adapter: Path):
    (adapter.parent / "base" / "config.json").unlink()
    with pytest.raises(hf_lora.BaseLoadError, match="asks for the base model"):
        hf_lora.from_pretrained(adapter)


def test_a_model_that_transformers_does_not_know(adapter: Path):
    config = adapter.parent / "base" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"llama99"'))
    with pytest.raises(hf_lora.BaseLoadError, match="llama99"):
        hf_lora.from_pretrained(adapter)


def test_a_name_that_would_drive_a_terminal_is_escaped(adapter: Path):
    edit.change_config(adapter, base_model_name_or_path="/x\x1b[31m\n")
    with pytest.raises(hf_lora.BaseLoadError) as caught:
        hf_lora.from_pretrained(adapter)
    assert str(caught.value).replace("\n", "").isprintable()


class TestBase:
    """``from_pretrained(source, base=...)``"""

    @pytest.mark.parametrize("kind", [str, Path])
    def test_a_folder(self, adapter: Path, kind: Any):
        shutil.move(adapter.parent / "base", adapter.parent / "moved")
        model = hf_lora.from_pretrained(adapter, base=kind(adapter.parent / "moved"))
        assert is_it(model, adapter)

    def test_the_revision_of_the_named_base_is_not_asked_of_another(self, adapter: Path):
        shutil.move(adapter.parent / "base", adapter.parent / "moved")
        edit.change_config(adapter, revision="v9")
        seen = {}

        class Spy(hf.LlamaForCausalLM):
            @classmethod
            def from_pretrained(cls, base, **kwargs):
                seen.update(kwargs)
                return super().from_pretrained(base, **kwargs)

        hf_lora.from_pretrained(adapter, base=adapter.parent / "moved", model_class=Spy)
        assert "revision" not in seen

    def test_a_loaded_model(self, adapter: Path):
        base = hf.LlamaForCausalLM.from_pretrained(adapter.parent / "base")
        shutil.rmtree(adapter.parent / "base")
        model = hf_lora.from_pretrained(adapter, base=base)
        assert model is base
        assert is_it(model, adapter)

    def test_a_loaded_model_takes_nothing_that_loads_one(self, adapter: Path):
        base = hf.LlamaForCausalLM.from_pretrained(adapter.parent / "base")
        with pytest.raises(hf_lora.ConfigError, match=r"so model_class, dtype cannot be used"):
            hf_lora.from_pretrained(
                adapter, base=base, model_class=hf.LlamaForCausalLM, dtype="auto"
            )

    def test_other_weights_are_refused_there_as_well(self, adapter: Path):
        MODELS["causal"]().save_pretrained(adapter.parent / "other")
        with pytest.raises(hf_lora.BaseMismatchError):
            hf_lora.from_pretrained(adapter, base=adapter.parent / "other")

    def test_a_base_that_is_not_there_either(self, adapter: Path):
        with pytest.raises(hf_lora.BaseLoadError, match="was given the base model '/nowhere'"):
            hf_lora.from_pretrained(adapter, base="/nowhere")

    def test_where_the_adapter_names_none(self, adapter: Path):
        edit.change_config(adapter, base_model_name_or_path=None)
        with pytest.raises(hf_lora.AdapterFileError, match=r"names no base model.*base="):
            hf_lora.from_pretrained(adapter)
        assert is_it(hf_lora.from_pretrained(adapter, base=adapter.parent / "base"), adapter)
