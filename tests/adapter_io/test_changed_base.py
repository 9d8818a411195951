"""Whoever changed the base in memory is known at save, and told by whoever opens the adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from hf_lora import AdapterMismatchError, BaseMismatchError, HfLoRAWarning
from tests import tiny
from tests.files import edit
from tests.model.models import TOKENS, llama


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(base: Path, **options: Any) -> nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(base, **options).eval()


def trained(model: nn.Module, targets: list[str], **fields: Any) -> nn.Module:
    hf_lora.wrap(model, targets, r=2, **fields)
    tiny.scramble(model)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(tokens).logits


def merged(model: nn.Module) -> nn.Module:
    return hf_lora.merge_and_unwrap(trained(model, ["q_proj"], adapter="first"))


def merged_by_peft(model: nn.Module) -> nn.Module:
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tiny.scramble(theirs)
    return theirs.merge_and_unload()


def with_another_norm(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    return model


def with_another_module(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    model.lm_head = nn.Linear(32, 48, bias=False)
    return model


CHANGES: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "merged": (merged, "merged into it for good: first"),
    "merged by PEFT": (merged_by_peft, "q_proj.weight"),
    "edited": (with_another_norm, "other weights: model.norm.weight"),
    "replaced": (with_another_module, "other weights: lm_head.weight"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_a_changed_base_is_told_at_save_and_refused_at_load(
    base: Path, tmp_path: Path, change: Callable[[nn.Module], nn.Module], words: str, shards: str
):
    (base / "model.safetensors").unlink()
    llama().save_pretrained(base, max_shard_size=shards)
    model = trained(change(opened(base)), ["v_proj"])
    with pytest.warns(HfLoRAWarning, match="the base that it was trained on is another") as told:
        hf_lora.save(model, tmp_path / "second")
    assert words in str(told[0].message)
    with pytest.raises(BaseMismatchError, match="the file says of it") as refused:
        hf_lora.from_pretrained(tmp_path / "second")
    assert words in str(refused.value)
    expected = logits(model)
    hf_lora.unwrap(model).save_pretrained(tmp_path / "whole")
    again = hf_lora.from_pretrained(tmp_path / "second", base=tmp_path / "whole")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_an_unchanged_base_is_not_talked_of(tmp_path: Path, dtype: torch.dtype, tied: bool):
    llama(tied=tied).save_pretrained(tmp_path / "base")
    model = trained(opened(tmp_path / "base", dtype=dtype), ["q_proj"], train=["norm"])
    hf_lora.save(model, tmp_path / "adapter")  # a warning would be an error here
    header = json.loads(edit.read_tensors(tmp_path / "adapter")[1]["hf_lora"])
    assert "base_changed" not in header
    hf_lora.merge(model)
    hf_lora.save(model, tmp_path / "while merged")


def test_a_base_whose_files_are_gone_or_broken_is_not_judged(base: Path, tmp_path: Path):
    model = trained(with_another_norm(opened(base)), ["q_proj"])
    (base / "model.safetensors").unlink()  # not written over: the model has it mapped
    (base / "model.safetensors").write_bytes(b"broken")
    hf_lora.save(model, tmp_path / "adapter")
    (base / "model.safetensors").unlink()
    hf_lora.save(model, tmp_path / "adapter")


class TestAddedTokens:
    NEW = torch.tensor([[5, 48, 7, 49]])

    def grown(self, base: Path) -> nn.Module:
        model = opened(base)
        model.resize_token_embeddings(50)
        return model

    def test_frozen_rows_are_told_and_the_small_base_is_refused(self, base: Path, tmp_path: Path):
        model = trained(self.grown(base), ["q_proj"])
        with pytest.warns(HfLoRAWarning, match=r"tokens were added \(48 on the disk, 50 in"):
            hf_lora.save(model, tmp_path / "adapter")
        with pytest.raises(BaseMismatchError, match=r"tokens were added[^$]*") as refused:
            hf_lora.from_pretrained(tmp_path / "adapter")
        assert "vocabulary of 50 tokens, this model has 48" in str(refused.value)
        expected = logits(model, self.NEW)
        hf_lora.unwrap(model).save_pretrained(tmp_path / "whole")
        again = hf_lora.from_pretrained(tmp_path / "adapter", base=tmp_path / "whole")
        assert torch.equal(logits(again, self.NEW), expected)

    @pytest.mark.parametrize("tied", [False, True])
    def test_rows_that_the_adapter_brings_make_the_base_grow(self, tmp_path: Path, tied: bool):
        llama(tied=tied).save_pretrained(tmp_path / "base")
        both = ["embed_tokens", "lm_head"]
        model = trained(self.grown(tmp_path / "base"), ["q_proj"], train=both)
        hf_lora.save(model, tmp_path / "adapter")
        again = hf_lora.from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(again, self.NEW), logits(model, self.NEW))
        with pytest.raises(AdapterMismatchError, match=r"resize_token_embeddings\(50\) makes room"):
            hf_lora.load(opened(tmp_path / "base"), tmp_path / "adapter")

    def test_half_of_the_rows_are_not_enough(self, base: Path, tmp_path: Path):
        model = trained(self.grown(base), ["q_proj"], train=["embed_tokens"])
        with pytest.warns(HfLoRAWarning, match="tokens were added"):
            hf_lora.save(model, tmp_path / "adapter")
        with pytest.raises(AdapterMismatchError, match="resize_token_embeddings"):
            hf_lora.from_pretrained(tmp_path / "adapter")

    def test_pefts_file_with_more_tokens_opens(self, base: Path, tmp_path: Path):
        config = peft.LoraConfig(
            r=2,
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens", "lm_head"],
            task_type="CAUSAL_LM",
        )
        theirs = peft.get_peft_model(self.grown(base), config).eval()
        tiny.scramble(theirs)
        theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        again = hf_lora.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(logits(again, self.NEW), logits(theirs, self.NEW))

    def test_a_smaller_vocabulary_is_opened_at_its_size(self, base: Path, tmp_path: Path):
        model = opened(base)
        model.resize_token_embeddings(40)
        trained(model, ["q_proj"], train=["embed_tokens", "lm_head"])
        hf_lora.save(model, tmp_path / "adapter")
        again = hf_lora.from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "lie", [3, [], {"merged": 3, "tokens": "x", "tensors": [3]}, {"merged": [[1]], "more": {}}]
)
def test_a_strangers_words_about_the_base_do_no_harm(base: Path, tmp_path: Path, lie: Any):
    hf_lora.save(trained(opened(base), ["q_proj"]), tmp_path / "adapter")
    tensors, metadata = edit.read_tensors(tmp_path / "adapter")
    header = json.loads(metadata["hf_lora"]) | {"base_changed": lie}
    edit.write_tensors(tmp_path / "adapter", tensors, {"hf_lora": json.dumps(header)})
    hf_lora.from_pretrained(tmp_path / "adapter")
    with pytest.raises(BaseMismatchError):
        hf_lora.load(with_another_norm(llama()), tmp_path / "adapter")
