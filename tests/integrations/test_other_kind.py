"""A full model and an adapter are not saved into one folder, whichever comes first."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from hf_lora import SaveError
from tests import tiny
from tests.model.models import TOKENS, llama

FIELDS = {"targets": ["q_proj"], "r": 2}


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def trained(model: nn.Module, **fields: object) -> nn.Module:
    hf_lora.wrap(model, **FIELDS | fields)
    tiny.scramble(model)
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestMergedIntoAnAdaptersFolder:
    def test_is_refused_with_the_reason_and_writes_nothing(self, tmp_path: Path):
        model = trained(llama())
        hf_lora.save(model, tmp_path)
        before = files(tmp_path)
        merged = hf_lora.merge_and_unwrap(model)
        with pytest.raises(SaveError, match=r"holds an adapter.*the adapter, which is in it"):
            merged.save_pretrained(tmp_path)
        assert files(tmp_path) == before

    @pytest.mark.parametrize("left", ["adapter_config.json", "adapter_model.safetensors"])
    def test_half_an_adapter_is_one(self, tmp_path: Path, left: str):
        model = trained(llama())
        hf_lora.save(model, tmp_path)
        for path in tmp_path.iterdir():
            if path.name != left:
                path.unlink()
        with pytest.raises(SaveError, match=left):
            hf_lora.merge_and_unwrap(model).save_pretrained(tmp_path)

    def test_elsewhere_it_saves_as_its_class_does(self, tmp_path: Path):
        model = trained(llama())
        expected = logits(model)
        hf_lora.save(model, tmp_path / "adapter")
        merged = hf_lora.merge_and_unwrap(model)
        merged.save_pretrained(tmp_path, max_shard_size="20KB")  # beside it, not in it
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(logits(again), expected)
        assert (tmp_path / "model.safetensors.index.json").exists()

    def test_one_method_is_all_that_stays(self):
        plain = llama()
        merged = hf_lora.merge_and_unwrap(trained(llama()))
        assert vars(merged).keys() - vars(plain).keys() == {"save_pretrained"}
        assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
        net = hf_lora.merge_and_unwrap(trained(tiny.Net()))
        assert vars(net).keys() == vars(tiny.Net()).keys()

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_keep_it_for_themselves(self, tmp_path: Path, way):
        model = trained(llama())
        hf_lora.save(model, tmp_path / "adapter")
        merged = hf_lora.merge_and_unwrap(model)
        twin = way(merged)
        with torch.no_grad():
            merged.lm_head.weight.zero_()
        with pytest.raises(SaveError):
            twin.save_pretrained(tmp_path / "adapter")
        twin.save_pretrained(tmp_path / "full")
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
        assert torch.equal(logits(again), logits(twin))

    def test_it_is_there_again_after_another_adapter_was_taken_off(self, tmp_path: Path):
        model = trained(llama())
        hf_lora.save(model, tmp_path / "adapter")
        merged = hf_lora.merge_and_unwrap(model)
        hf_lora.unwrap(trained(merged, targets=["v_proj"]))
        with pytest.raises(SaveError, match="holds an adapter"):
            merged.save_pretrained(tmp_path / "adapter")
        hf_lora.merge_and_unwrap(trained(merged, targets=["v_proj"]))
        with pytest.raises(SaveError, match="holds an adapter"):
            merged.save_pretrained(tmp_path / "adapter")
        merged.save_pretrained(tmp_path / "full")

    def test_a_method_of_somebody_elses_is_called_and_comes_back(self, tmp_path: Path):
        model = llama()
        calls = []
        model.save_pretrained = own = lambda folder: calls.append(folder)
        assert hf_lora.unwrap(trained(model)).save_pretrained is own
        hf_lora.merge_and_unwrap(trained(model)).save_pretrained(tmp_path)
        assert calls == [tmp_path]


class TestAnAdapterIntoAModelsFolder:
    @pytest.mark.parametrize("shards", ["5GB", "20KB"])
    def test_is_refused_with_the_reason_and_writes_nothing(self, tmp_path: Path, shards: str):
        llama().save_pretrained(tmp_path, max_shard_size=shards)
        before = files(tmp_path)
        model = trained(hf.AutoModelForCausalLM.from_pretrained(tmp_path))
        for save in (
            lambda: hf_lora.save(model, tmp_path),
            lambda: model.save_pretrained(tmp_path),
        ):
            with pytest.raises(SaveError, match=r"holds a full model \(model.*another folder"):
                save()
        assert files(tmp_path) == before

    def test_a_named_adapter_goes_into_a_folder_of_its_own_there(self, tmp_path: Path):
        llama().save_pretrained(tmp_path)
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
        plain = logits(model)
        trained(model, adapter="fr")
        hf_lora.save(model, tmp_path)
        assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path)), plain)
        again = hf_lora.from_pretrained(tmp_path / "fr")
        assert torch.equal(logits(again), logits(model))

    @pytest.mark.parametrize(
        "file", ["model.safetensors", "pytorch_model_fsdp.bin", "optimizer.bin"]
    )
    def test_weights_without_a_configuration_are_no_model(self, tmp_path: Path, file: str):
        """As in the checkpoints of a training loop."""
        (tmp_path / file).write_bytes(b"")
        hf_lora.save(trained(tiny.Net()), tmp_path)

    @pytest.mark.filterwarnings("ignore:This adapter names:hf_lora.errors.HfLoRAWarning")
    def test_after_a_merge_into_the_models_own_folder(self, tmp_path: Path):
        merged = hf_lora.merge_and_unwrap(trained(llama()))
        merged.save_pretrained(tmp_path)
        with pytest.raises(SaveError, match="full model"):
            hf_lora.save(trained(merged, targets=["v_proj"]), tmp_path)
