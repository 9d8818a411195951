"""PEFT's files with the embeddings of a base to which tokens were added, trained there or not."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import hf_lora
from hf_lora import AdapterFileError, AdapterMismatchError, HfLoRAWarning
from hf_lora.adapter_io.describe import describe
from tests import tiny
from tests.files.both_ways import quiet
from tests.model.models import llama

pytestmark = [quiet, pytest.mark.filterwarnings(r"ignore:[\s\S]*left out:hf_lora.HfLoRAWarning")]

WEIGHTS = "adapter_model.safetensors"
SIZE, GROWN = 48, 50
NEW = torch.tensor([[5, 48, 7, 49]])
BOTH = ["embed_tokens", "lm_head"]
WAYS: dict[str, dict[str, Any]] = {
    "embeddings frozen": {"target_modules": ["q_proj"]},
    "both in full": {"target_modules": ["q_proj"], "modules_to_save": BOTH},
    "embeddings in full": {"target_modules": ["q_proj"], "modules_to_save": BOTH[:1]},
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": BOTH[1:]},
    "both adapted": {"target_modules": ["q_proj", *BOTH]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 47]},
    "rows of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [47, 3], "lm_head": [47, 3]},
    },
}
WHOLE = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def opened(base: Path, size: int = SIZE) -> nn.Module:
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    if size != SIZE:
        model.resize_token_embeddings(size)
    return model.eval()


def pefts(folder: Path, size: int, tied: bool, embeddings: bool | str = "auto", **way: Any) -> Any:
    """Save an adapter of PEFT's, and its base beside it; return PEFT's model."""
    llama(tied=tied).save_pretrained(folder / "base")
    model = opened(folder / "base", size)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **way)).eval()
    tiny.scramble(theirs)
    theirs.save_pretrained(folder / "adapter", save_embedding_layers=embeddings)
    return theirs


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor = NEW) -> torch.Tensor:
    return model.eval()(tokens).logits


@TIED
@WHOLE
def test_it_opens_with_its_rows_and_pefts_outputs(tmp_path: Path, way: dict[str, Any], tied: bool):
    theirs = pefts(tmp_path, GROWN, tied, **way)
    ours = hf_lora.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs))
    with hf_lora.no_adapter(ours), theirs.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(theirs))
    in_full = way.get("modules_to_save", [])
    assert sum("lora_copy" in name for name, _ in ours.named_parameters()) == len(in_full)


@TIED
@pytest.mark.parametrize("embeddings", ["auto", False])
def test_rows_that_were_added_open_with_all_that_there_is_of_them(
    tmp_path: Path, tied: bool, embeddings: Any
):
    rows = {"embed_tokens": [49, 5, 48], "lm_head": [49, 5, 48]}
    way = {"target_modules": ["q_proj"], "trainable_token_indices": rows}
    theirs = pefts(tmp_path, GROWN, tied, embeddings, **way)
    ours = hf_lora.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert sum("lora_rows" in name for name, _ in ours.named_parameters()) == 2 - tied


@TIED
@WHOLE
def test_a_file_that_repeats_a_base_of_the_same_size(
    tmp_path: Path, way: dict[str, Any], tied: bool
):
    theirs = pefts(tmp_path, SIZE, tied, embeddings=True, **way)
    tokens = NEW % SIZE
    for ours in (
        hf_lora.from_pretrained(tmp_path / "adapter"),
        hf_lora.load(opened(tmp_path / "base"), tmp_path / "adapter"),
    ):
        torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens))


@TIED
def test_a_users_own_base_is_never_written_to(tmp_path: Path, tied: bool):
    pefts(tmp_path, GROWN, tied, **WAYS["embeddings frozen"])
    for size, words in ((SIZE, r"resize_token_embeddings\(50\)"), (GROWN, "from_pretrained loads")):
        model = opened(tmp_path / "base", size)
        before = model.get_input_embeddings().weight.clone()
        with pytest.raises(AdapterMismatchError, match=words):
            hf_lora.from_pretrained(tmp_path / "adapter", base=model)
        assert torch.equal(model.get_input_embeddings().weight, before)


def test_rows_of_another_base_are_refused(tmp_path: Path):
    pefts(tmp_path, GROWN, True, **WAYS["embeddings frozen"])
    other = llama(tied=True)
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterMismatchError, match=r"embed_tokens\.weight: neither a factor"):
        hf_lora.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("adapted", BOTH)
def test_rows_of_one_end_are_not_enough(tmp_path: Path, adapted: str):
    """PEFT writes the end that it adapts alone, and has random rows at the other afterwards."""
    pefts(tmp_path, GROWN, False, target_modules=["q_proj", adapted])
    with pytest.raises(AdapterMismatchError, match=r"resize_token_embeddings\(50\)"):
        hf_lora.from_pretrained(tmp_path / "adapter")


def test_a_base_in_another_type_has_the_rows_in_it(tmp_path: Path):
    theirs = pefts(tmp_path, GROWN, False, **WAYS["embeddings frozen"])
    ours = hf_lora.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    rows = theirs.get_input_embeddings().weight
    assert torch.equal(ours.get_input_embeddings().weight, rows.to(torch.bfloat16))


def test_what_is_left_out_is_told_and_counted(tmp_path: Path):
    pefts(tmp_path, GROWN, False, **WAYS["both in full"])
    with pytest.warns(HfLoRAWarning, match=r"lm_head\.original_module\.weight is what the base"):
        hf_lora.from_pretrained(tmp_path / "adapter")
    left_out = 4 * GROWN * 32 * 4  # of each end a second key, and what the base has
    assert describe(tmp_path / "adapter").causes["left out, as the base has it"] == left_out


def test_what_a_wrapper_has_alone_is_no_module_in_full(tmp_path: Path):
    pefts(tmp_path, GROWN, False, **WAYS["both in full"])
    path = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(path)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises((AdapterFileError, AdapterMismatchError), match="lm_head"):
        hf_lora.from_pretrained(tmp_path / "adapter")


def test_an_embedding_without_rows_is_refused(tmp_path: Path):
    pefts(tmp_path, GROWN, False, **WAYS["embeddings frozen"])
    path = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(path)
    for name in ("lm_head", "model.embed_tokens"):
        tensors[f"base_model.model.{name}.weight"] = torch.tensor(1.0)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(AdapterMismatchError, match=r"shape \(\), in the model \(48, 32\)"):
        hf_lora.from_pretrained(tmp_path / "adapter")


def bert() -> nn.Module:
    """A masked language model, whose head has a number for each token beside a row."""
    torch.manual_seed(3)
    return hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    """A model with two ends, whose embeddings are one module in three places."""
    torch.manual_seed(4)
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=SIZE, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize(
    ("make", "target", "task"), [(bert, "query", None), (t5, "q", "SEQ_2_SEQ_LM")]
)
def test_rows_that_stand_in_other_places(tmp_path: Path, make: Any, target: str, task: str | None):
    made = make()
    made.save_pretrained(tmp_path / "base")
    grown = type(made).from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(GROWN)
    head = grown.get_output_embeddings()
    if head.bias is not None:
        with torch.no_grad():
            head.bias[SIZE:] += 0.5
    config = peft.LoraConfig(r=2, target_modules=[target], task_type=task)
    theirs = peft.get_peft_model(grown, config).eval()
    tiny.scramble(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = hf_lora.from_pretrained(tmp_path / "adapter", model_class=type(made)).eval()
    tokens = {"input_ids": NEW} | ({"decoder_input_ids": NEW} if task else {})
    with torch.no_grad():
        torch.testing.assert_close(ours(**tokens).logits, theirs(**tokens).logits)
