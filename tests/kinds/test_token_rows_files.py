"""Rows in files: PEFT's, both ways; bases that lack the tokens; hostile and damaged files."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import hf_lora
from hf_lora.adapter_io.describe import describe
from hf_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    ConfigError,
    HfLoRAWarning,
    SaveError,
    TargetError,
)
from hf_lora.hub.card.card import adapter_card
from hf_lora.model.registry import registry_of
from tests.integrations.training import tokenizer
from tests.kinds.token_models import IDS as TOKENS
from tests.kinds.token_models import (
    MODELS,
    ROWS,
    VOCABULARY,
    answers,
    llama,
    loud,
    rows_of,
    wrapped,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EACH = pytest.mark.parametrize("name", [name for name in MODELS if name != "bert"])
TARGETS = pytest.mark.parametrize("targets", [(), ("q_proj", "c_attn", "q")], ids=["rows", "lora"])
UNTIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def targets_of(model: nn.Module, wanted: tuple[str, ...]) -> list[str]:
    tails = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    return [name for name in wanted if name in tails]


def same_bytes(one: Path, other: Path) -> bool:
    return all((one / n).read_bytes() == (other / n).read_bytes() for n in (WEIGHTS, CONFIG))


@EACH
@TARGETS
def test_it_is_loaded_as_it_was_and_peft_computes_the_same(
    name: str, targets: tuple[str, ...], tmp_path: Path
):
    make, _ = MODELS[name]
    model = wrapped(name, targets=targets_of(make(), targets), r=2)
    hf_lora.save(model, tmp_path / "a")
    again = hf_lora.load(make(), tmp_path / "a")
    assert torch.equal(answers(again), answers(model))
    assert hf_lora.adapters(again) == hf_lora.adapters(model)
    hf_lora.save(again, tmp_path / "b")
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path / "a")).eval()
    torch.testing.assert_close(answers(theirs), answers(model), rtol=1e-5, atol=1e-5)
    whole = max(load_file(tmp_path / "a" / WEIGHTS).values(), key=torch.Tensor.numel)
    assert whole.numel() < VOCABULARY * 16


SAID: dict[str, Any] = {
    "a list": [9, 3],
    "the head": {"lm_head": [9, 3]},
    "both, the same": {"embed_tokens": [9, 3], "lm_head": [9, 3]},
    "both, others": {"embed_tokens": [9, 3], "lm_head": [4]},
}


@UNTIED
@pytest.mark.parametrize("said", SAID.values(), ids=list(SAID))
@pytest.mark.parametrize("targets", [["q_proj"], "dummy-target-modules"], ids=["lora", "rows"])
def test_pefts_files_are_read_and_written_again(
    tied: bool, said: Any, targets: Any, tmp_path: Path
):
    config = peft.LoraConfig(target_modules=targets, trainable_token_indices=said, r=2)
    theirs = loud(peft.get_peft_model(llama(tie_word_embeddings=tied), config)).eval()
    theirs.save_pretrained(str(tmp_path / "pefts"))
    ours = hf_lora.load(llama(tie_word_embeddings=tied), tmp_path / "pefts").eval()
    torch.testing.assert_close(answers(ours), answers(theirs), rtol=1e-5, atol=1e-5)
    hf_lora.save(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(
        llama(tie_word_embeddings=tied), str(tmp_path / "ours")
    ).eval()
    torch.testing.assert_close(answers(back), answers(theirs), rtol=1e-5, atol=1e-5)
    merged = hf_lora.merge_and_unwrap(ours)
    torch.testing.assert_close(answers(merged), answers(theirs), rtol=1e-4, atol=1e-5)


def test_a_tie_that_peft_does_not_see_is_written_for_each_module(tmp_path: Path):
    def net() -> Any:
        model = llama()
        model.lm_head.weight = model.model.embed_tokens.weight  # the configuration says no tie
        return model

    model = loud(hf_lora.wrap(net(), (), train_rows={"lm_head": ROWS}))
    hf_lora.save(model, tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 2
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    torch.testing.assert_close(answers(theirs), answers(model), rtol=1e-5, atol=1e-5)
    again = hf_lora.load(net(), tmp_path)
    assert torch.equal(answers(again), answers(model))
    assert again.lm_head.lora_rows is again.model.embed_tokens.lora_rows


def test_pefts_missing_bias_is_told(tmp_path: Path):
    model = wrapped("bert")
    with pytest.warns(HfLoRAWarning, match="PEFT leaves out the bias of 'cls.predictions.decoder'"):
        hf_lora.save(model, tmp_path)
    again = hf_lora.load(MODELS["bert"][0](), tmp_path)
    assert torch.equal(answers(again), answers(model))
    theirs = peft.PeftModel.from_pretrained(MODELS["bert"][0](), str(tmp_path)).eval()
    assert not torch.allclose(answers(theirs), answers(model), atol=1e-3)


def test_names_that_peft_would_take_for_others_are_refused(tmp_path: Path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.keywords = nn.Embedding(5, 4), nn.Embedding(5, 4)

    model = hf_lora.wrap(Net(), (), train_rows={"words": [1]})
    with pytest.raises(SaveError, match="keywords ends like words"):
        hf_lora.save(model, tmp_path)


@UNTIED
def test_new_tokens_come_back_with_a_base_that_lacks_them(tied: bool, tmp_path: Path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    words = tokenizer()
    words.add_tokens([f"w{n}" for n in range(len(words), VOCABULARY)])
    assert len(words) == VOCABULARY
    words.add_tokens(["<new>", "<more>"])
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(words))
    rows = {"embed_tokens": ["<new>", "<more>"]}
    rows |= {} if tied else {"lm_head": ["<new>", "<more>"]}
    loud(hf_lora.wrap(model, ["q_proj"], r=2, train_rows=rows, tokenizer=words)).eval()
    model.save_pretrained(tmp_path / "adapter")
    words.save_pretrained(tmp_path / "adapter")
    again = hf_lora.from_pretrained(tmp_path / "adapter").eval()
    tokens = torch.tensor([[1, VOCABULARY, 5, VOCABULARY + 1]])
    assert torch.equal(answers(again, tokens), answers(model, tokens))
    assert again.config.vocab_size == VOCABULARY + 2
    assert hf_lora.adapters(again)["default"].train_rows["embed_tokens"] == (40, 41)
    found = hf.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert found.convert_tokens_to_ids(["<new>", "<more>"]) == [VOCABULARY, VOCABULARY + 1]
    assert max(p.numel() for p in load_file(tmp_path / "adapter" / WEIGHTS).values()) < 100
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(AdapterMismatchError, match=r"resize_token_embeddings\(42\) makes room"):
        hf_lora.load(base, tmp_path / "adapter")
    base.resize_token_embeddings(VOCABULARY + 2)
    assert torch.equal(
        hf_lora.load(base, tmp_path / "adapter").eval()(tokens).logits, again(tokens).logits
    )


@pytest.mark.parametrize(
    "rows", [{"embed_tokens": [40, 41]}, {"lm_head": [40], "embed_tokens": [40, 41]}]
)
def test_rows_that_no_file_has_are_missed(rows: dict[str, Any], tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(42)
    loud(hf_lora.wrap(model, (), train_rows=rows))
    with pytest.warns(HfLoRAWarning, match="tokens were added"):
        model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterMismatchError, match="42"):
        hf_lora.from_pretrained(tmp_path / "adapter")


def test_what_the_base_has_in_the_place_of_the_rows_does_not_matter_and_all_else_does(
    tmp_path: Path,
):
    hf_lora.save(wrapped("tied", rows=range(20)), tmp_path)
    base = llama(tie_word_embeddings=True)
    with torch.no_grad():
        base.lm_head.weight[:20] = 7.0
    hf_lora.load(base, tmp_path)
    base = llama(tie_word_embeddings=True)
    with torch.no_grad():
        base.lm_head.weight[20:] = 7.0
    with pytest.raises(BaseMismatchError, match="embed_tokens"):
        hf_lora.load(base, tmp_path)


def test_saving_says_nothing_of_rows_that_the_adapter_has(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    llama().save_pretrained(tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.embed_tokens.weight[:20] = 1.0
    hf_lora.wrap(model, ["q_proj"], r=2, train_rows={"embed_tokens": range(20)})
    hf_lora.save(model, tmp_path / "adapter")
    assert not [w for w in recwarn if issubclass(w.category, HfLoRAWarning)]


def test_replacing_and_restoring_keep_the_tensors(tmp_path: Path):
    model = wrapped("tied", targets=["q_proj"], r=2)
    want, rows = answers(model), rows_of(model)
    hf_lora.save(model, tmp_path / "a")
    with torch.no_grad():
        rows.zero_()
    hf_lora.load(model, tmp_path / "a", replace=True, trainable=True)
    assert rows_of(model) is rows
    assert torch.equal(answers(model), want)
    other = wrapped("tied", rows=[2], targets=["q_proj"], r=2)
    hf_lora.save(other, tmp_path / "b")
    hf_lora.load(model, tmp_path / "b", replace=True)
    assert torch.equal(answers(model), answers(other))


def test_a_failed_load_leaves_the_rows_that_were_there(tmp_path: Path):
    model = wrapped("tied")
    want, rows = answers(model), rows_of(model)
    hf_lora.save(wrapped("tied", rows=[2]), tmp_path)
    edit(tmp_path, trainable_token_indices={"model.embed_tokens": [3]})
    with pytest.raises(AdapterFileError, match="contradicts the header"):
        hf_lora.load(model, tmp_path, replace=True)
    assert rows_of(model) is rows
    assert torch.equal(answers(model), want)


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of a configuration."""
    content = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(content))


def foreign(folder: Path, **fields: Any) -> None:
    """Make a file of somebody else's, and change its configuration."""
    hf_lora.save(wrapped("llama", targets=["q_proj"], r=2), folder)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    edit(folder, **fields)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "does not say which rows"),
        ({"lm_head": [1, 2, 3]}, "does not say which rows"),
        ([1, 2], "has 3 rows, and trainable_token_indices 2"),
        ([1, 2, -3], "-3 is not the number of a row"),
        ([1, 2, True], "True is not the number of a row"),
        ([1, 2, 10**30], "is not the number of a row"),
        ([1, 2, 2], "a row is named twice"),
        ({"embed_tokens": "abc"}, "'abc' is not a list of rows"),
        (7, "7 is not a list of rows"),
        ([3, 9, VOCABULARY + 5], r"resize_token_embeddings\(46\) makes room"),
        ({"embed_tokens": [3, 9, 11], "lm_head": [3, 9, 11]}, "there are no rows of lm_head"),
    ],
)
def test_configurations_that_contradict_the_file(said: Any, words: str, tmp_path: Path):
    foreign(tmp_path, trainable_token_indices=said)
    model = llama()
    with pytest.raises((AdapterFileError, AdapterMismatchError), match=words):
        hf_lora.load(model, tmp_path)
    assert not hasattr(model, "_hf_lora")


def test_rows_of_other_widths_and_types_are_refused(tmp_path: Path):
    foreign(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if "token_adapter" in key)
    for wrong, words in (
        (torch.zeros(3, 8), "has rows of 8 numbers"),
        (torch.zeros(48), "is no rows"),
        (torch.zeros(3, 16, dtype=torch.int32), "is no rows"),
        (torch.full((3, 16), torch.nan), "not finite"),
    ):
        save_file(tensors | {key: wrong}, tmp_path / WEIGHTS)
        with pytest.raises((AdapterFileError, AdapterMismatchError), match=words):
            hf_lora.load(llama(), tmp_path)


@UNTIED
def test_a_checkpoint_on_disk_is_merged_as_a_model_in_memory_is(tied: bool, tmp_path: Path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    for rows in ({"embed_tokens": ROWS}, {"embed_tokens": [3], "lm_head": [9, 3]}):
        if tied and len(rows) > 1:
            continue
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loud(hf_lora.wrap(model, ["q_proj"], r=2, train_rows=rows))
        name = f"{len(rows)}"
        hf_lora.save(model, tmp_path / name)
        hf_lora.merge_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-merged")
        found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged")
        want = hf_lora.merge_and_unwrap(model)
        torch.testing.assert_close(found.state_dict(), want.state_dict(), rtol=1e-6, atol=1e-6)
        assert torch.equal(found.lm_head.weight, want.lm_head.weight)
        assert torch.equal(found.model.embed_tokens.weight, want.model.embed_tokens.weight)
        assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied


@UNTIED
def test_a_checkpoint_on_disk_gets_the_rows_that_it_lacks(tied: bool, tmp_path: Path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCABULARY + 2)
    rows = {"embed_tokens": [3, 41, 40]} | ({} if tied else {"lm_head": [40, 41]})
    loud(hf_lora.wrap(model, (), train_rows=rows)).save_pretrained(tmp_path / "adapter")
    hf_lora.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    want = hf_lora.merge_and_unwrap(model)
    assert found.config.vocab_size == VOCABULARY + 2
    assert all(torch.equal(found.state_dict()[k], v) for k, v in want.state_dict().items())


def test_rows_of_two_adapters_are_merged_on_disk_as_a_mean_alone(tmp_path: Path):
    llama().save_pretrained(tmp_path / "base")
    for name, ids in (("a", [3, 9]), ("b", [9, 11])):
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loud(hf_lora.wrap(model, (), train_rows={"embed_tokens": ids}))
        hf_lora.save(model, tmp_path / name)
    folders = {tmp_path / "a": 0.25, tmp_path / "b": 0.75}
    with pytest.raises(TargetError, match=r"row 9 of model\.embed_tokens\.weight is"):
        hf_lora.merge_checkpoint(tmp_path / "base", [*folders], tmp_path / "no")
    hf_lora.merge_checkpoint(tmp_path / "base", folders, tmp_path / "merged")
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model = hf_lora.load(llama(), tmp_path / "a")
    hf_lora.load(model, tmp_path / "b", adapter="b")
    hf_lora.merge(model, {"default": 0.25, "b": 0.75})
    weight = found.model.embed_tokens.weight
    torch.testing.assert_close(weight, model.model.embed_tokens.weight, rtol=1e-6, atol=1e-7)


def test_it_is_described_and_has_a_card(tmp_path: Path):
    model = wrapped("tied")
    hf_lora.save(model, tmp_path)
    found = describe(tmp_path)
    assert [(rows.name, rows.shape) for rows in found.rows] == [("model.embed_tokens", (3, 16))]
    assert found.parameters == 48
    assert sum(found.causes.values()) == found.file_bytes
    assert "trained rows: 3 of model.embed_tokens" in str(found)
    card = adapter_card(model, registry_of(model), ["default"], base=None, repo_id="me/rows")
    assert "| Rows that were trained | 3 of `model.embed_tokens`" in str(card)
    assert "it refuses trained rows of embeddings, here model.embed_tokens" in str(card)


def test_tokens_are_told_apart_by_a_tokenizer():
    words = tokenizer()
    known = words.convert_ids_to_tokens([5, 6])
    model = hf_lora.wrap(llama(), (), train_rows={"embed_tokens": [*known, 3]}, tokenizer=words)
    assert hf_lora.adapters(model)["default"].train_rows == {"embed_tokens": (3, 5, 6)}
    hf_lora.add_adapter(model, "b", (), train_rows={"lm_head": known[0]}, tokenizer=words)
    assert hf_lora.adapters(model)["b"].train_rows == {"lm_head": (5,)}
    with pytest.raises(ConfigError, match=r"tokenizer\.convert_tokens_to_ids"):
        hf_lora.wrap(llama(), (), train_rows={"embed_tokens": known})
    with pytest.raises(ConfigError, match=r"<never>[\s\S]*add_tokens"):
        hf_lora.plan(llama(), (), train_rows={"embed_tokens": ["<never>"]}, tokenizer=words)
    assert TOKENS.max() < VOCABULARY
