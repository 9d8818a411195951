"""Files of adapters that train tied embeddings: ours in PEFT, PEFT's in ours, tied and untied."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import AdapterFileError, AdapterMismatchError, UnsupportedAdapterError
from hf_lora.files.read import read_folder
from hf_lora.hub.card.facts import adapter_facts, folder_facts
from hf_lora.model.registry import registry_of
from tests.files import edit
from tests.files.both_ways import quiet
from tests.files.refusing import refuse
from tests.model.models import llama
from tests.model.tied import LLAMA, MODELS, Tied, bert, each_end, is_one, weights
from tests.oracle.adapting import TOLERANCE, distance, scramble

pytestmark = quiet

BERT = Tied(bert, "query", ("bert.embeddings.word_embeddings", "cls.predictions.decoder"))
Q = "model.layers.{}.self_attn.q_proj.weight"
HEAD, EMBED = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"


def tied_llama() -> nn.Module:
    return llama(tied=True)


@torch.no_grad()
def answers(model: nn.Module, tied: Tied = LLAMA) -> torch.Tensor:
    return tied.logits(model.eval())


def saved(tied: Tied, train: Any, folder: Path) -> torch.Tensor:
    model = tied.wrap(train)
    scramble(model)
    hf_lora.save(model, folder)
    return answers(model, tied)


def pefts(folder: Path, tied: Tied = LLAMA, **fields: Any) -> torch.Tensor:
    """Save an adapter with PEFT and return what the model answers with it."""
    config = peft.LoraConfig(r=2, target_modules=[tied.target], **fields)
    model = peft.get_peft_model(tied.build(), config)
    scramble(model)
    model.save_pretrained(folder)
    return answers(model, tied)


class TestOurs:
    @each_end
    @pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
    def test_peft_answers_the_same(self, tied: Tied, train: Any, low: bool, tmp_path: Path):
        expected = saved(tied, train, tmp_path)
        theirs = peft.PeftModel.from_pretrained(tied.build(), tmp_path, low_cpu_mem_usage=low)
        assert distance(answers(theirs, tied), expected) < TOLERANCE

    @each_end
    def test_it_loads_as_one_and_is_saved_the_same(self, tied: Tied, train: Any, tmp_path: Path):
        expected = saved(tied, train, tmp_path / "first")
        model = hf_lora.load(tied.build(), tmp_path / "first", trainable=True)
        assert torch.equal(answers(model, tied), expected)
        assert is_one(weights(model, tied))
        hf_lora.save(model, tmp_path / "second")
        for name in (edit.CONFIG, edit.WEIGHTS):
            first, second = ((tmp_path / f / name).read_bytes() for f in ("first", "second"))
            assert first == second

    @pytest.mark.parametrize("train", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]])
    def test_pefts_field_is_written_and_peft_trains_one_tensor(self, train: Any, tmp_path: Path):
        saved(LLAMA, train, tmp_path)
        fields = edit.read_config(tmp_path)
        assert fields["ensure_weight_tying"] is True
        assert fields["modules_to_save"] == ["embed_tokens", "lm_head"]
        tensors, _ = edit.read_tensors(tmp_path)
        assert torch.equal(tensors[HEAD], tensors[EMBED])
        theirs = peft.PeftModel.from_pretrained(tied_llama(), tmp_path, is_trainable=True)
        copied = [n for n, p in theirs.named_parameters() if p.requires_grad and "lora_" not in n]
        assert len(copied) == 1

    @pytest.mark.parametrize("name", ["t5", "bart", "own", "bert"])
    def test_where_peft_cannot_tie_it_reads_each_module(self, name: str, tmp_path: Path):
        """It would put a linear layer without bias in the place of everything that is tied."""
        tied = BERT if name == "bert" else MODELS[name]
        expected = saved(tied, tied.ends[:1], tmp_path)
        assert "ensure_weight_tying" not in edit.read_config(tmp_path)
        theirs = peft.PeftModel.from_pretrained(tied.build(), tmp_path)
        assert distance(answers(theirs, tied), expected) < TOLERANCE
        assert is_one(weights(hf_lora.load(tied.build(), tmp_path), tied))

    def test_the_plan_knows_the_size_of_the_file(self, tmp_path: Path):
        for name, tied in {**MODELS, "bert": BERT}.items():
            saved(tied, tied.ends[:1], tmp_path / name)
            tensors, _ = edit.read_tensors(tmp_path / name)
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            plan = hf_lora.plan(tied.build(), tied.target, r=2, train=tied.ends[:1])
            assert plan.file_bytes == size
            assert plan.weight_bytes < size

    @pytest.mark.parametrize("module", ["cls", "decoder", "predictions"])
    def test_modules_inside_of_others_that_are_tied(self, module: str, tmp_path: Path):
        expected = saved(BERT, [module], tmp_path)
        theirs = peft.PeftModel.from_pretrained(bert(), tmp_path)
        assert distance(answers(theirs, BERT), expected) < TOLERANCE
        model = hf_lora.load(bert(), tmp_path)
        assert torch.equal(answers(model, BERT), expected)
        head = model.cls.predictions
        assert head.decoder.bias is head.bias
        assert is_one(weights(model, BERT))

    def test_another_type_in_the_file(self, tmp_path: Path):
        model = LLAMA.wrap(["lm_head"])
        scramble(model)
        hf_lora.save(model, tmp_path, dtype="bfloat16")
        again = hf_lora.load(tied_llama(), tmp_path)
        assert is_one(weights(again, LLAMA))
        assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16().float())

    def test_a_gathered_state_dict_without_the_second_name(self, tmp_path: Path):
        """What saves safetensors leaves all names of a tensor out but the first."""
        model = LLAMA.wrap(["lm_head"])
        scramble(model)
        first = {
            id(t): name for name, t in reversed(list(model.state_dict(keep_vars=True).items()))
        }
        gathered = {name: model.state_dict()[name] for name in first.values()}
        assert "lm_head.lora_copy_weight" not in gathered
        model.save_pretrained(tmp_path, state_dict=gathered)
        assert torch.equal(answers(hf_lora.load(tied_llama(), tmp_path)), answers(model))

    def test_a_base_that_was_untied_reads_one_tensor_too(self, tmp_path: Path):
        expected = saved(LLAMA, ["lm_head"], tmp_path)
        base = llama()
        base.load_state_dict(tied_llama().state_dict())
        model = hf_lora.load(base, tmp_path)
        assert torch.equal(answers(model), expected)
        assert is_one(weights(model, LLAMA))
        hf_lora.merge(model)
        assert torch.equal(*weights(model, LLAMA))
        assert distance(answers(model), expected) < TOLERANCE
        hf_lora.unwrap(model)
        assert torch.equal(answers(model), answers(tied_llama()))

    def test_the_card_and_a_file_alone_count_it_once(self, tmp_path: Path):
        saved(LLAMA, ["lm_head"], tmp_path)
        model = hf_lora.load(tied_llama(), tmp_path)
        (here,) = adapter_facts(registry_of(model), ["default"])
        assert folder_facts("default", read_folder(tmp_path)).parameters == here.parameters
        assert here.trained == ("lm_head", "model.embed_tokens")


class TestPefts:
    @pytest.mark.parametrize("named", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
    def test_with_the_field_it_is_one_tensor(self, named: list[str], tmp_path: Path):
        expected = pefts(tmp_path, modules_to_save=list(named), ensure_weight_tying=True)
        model = hf_lora.load(tied_llama(), tmp_path, trainable=True)
        assert distance(answers(model), expected) < TOLERANCE
        assert is_one(weights(model, LLAMA))
        hf_lora.save(model, tmp_path / "again")
        assert edit.read_config(tmp_path / "again")["ensure_weight_tying"] is True
        theirs = peft.PeftModel.from_pretrained(tied_llama(), tmp_path / "again")
        assert distance(answers(theirs), expected) < TOLERANCE

    @pytest.mark.parametrize("named", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
    def test_without_it_each_module_has_its_own(self, named: list[str], tmp_path: Path):
        expected = pefts(tmp_path, modules_to_save=named)
        edit.change_config(tmp_path, ensure_weight_tying=...)
        model = hf_lora.load(tied_llama(), tmp_path, trainable=True)
        assert distance(answers(model), expected) < TOLERANCE
        assert not is_one(weights(model, LLAMA))
        hf_lora.save(model, tmp_path / "again")
        assert "ensure_weight_tying" not in edit.read_config(tmp_path / "again")
        theirs = peft.PeftModel.from_pretrained(tied_llama(), tmp_path / "again")
        assert distance(answers(theirs), expected) < TOLERANCE
        again = hf_lora.load(tied_llama(), tmp_path / "again")
        assert torch.equal(answers(again), answers(model))
        assert not is_one(weights(again, LLAMA))
        hf_lora.merge(model)
        assert distance(answers(model), expected) < TOLERANCE
        assert model.config.tie_word_embeddings is False
        hf_lora.unmerge(model)
        assert model.config.tie_word_embeddings is True
        model.tie_weights()
        assert distance(answers(model), expected) < TOLERANCE

    def test_embeddings_of_a_name_that_peft_forgets(self, tmp_path: Path):
        """It takes the head's name out of the file, by which alone it knows what is meant."""
        tied = MODELS["gpt2"]
        expected = pefts(tmp_path, tied, modules_to_save=["lm_head"], ensure_weight_tying=True)
        assert edit.read_config(tmp_path)["modules_to_save"] == ["transformer.wte"]
        model = hf_lora.load(tied.build(), tmp_path)
        assert distance(answers(model, tied), expected) < TOLERANCE
        assert is_one(weights(model, tied))

    def test_a_field_that_peft_does_not_heed(self, tmp_path: Path):
        """T5's embeddings have a name that it does not know, and nothing is tied."""
        tied = MODELS["t5"]
        expected = pefts(tmp_path, tied, modules_to_save=["shared"], ensure_weight_tying=True)
        model = hf_lora.load(tied.build(), tmp_path)
        assert distance(answers(model, tied), expected) < TOLERANCE
        assert not is_one(weights(model, tied))

    def test_an_untied_base(self, tmp_path: Path):
        build = llama
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        config.ensure_weight_tying = True
        config.modules_to_tie = config.target_modules_to_tie = None
        model = peft.get_peft_model(build(), config)
        scramble(model)
        model.save_pretrained(tmp_path)
        expected = answers(model)
        assert distance(answers(hf_lora.load(build(), tmp_path)), expected) < TOLERANCE

    def test_what_is_tied_inside_of_one_module(self, tmp_path: Path):
        expected = pefts(tmp_path, BERT, modules_to_save=["cls"])
        model = hf_lora.load(bert(), tmp_path)
        assert distance(answers(model, BERT), expected) < TOLERANCE
        head = model.cls.predictions
        assert head.bias is head.decoder.bias
        assert head.decoder.weight is not model.bert.embeddings.word_embeddings.weight

    @pytest.mark.parametrize("value", [1, "yes", [True]])
    def test_a_field_that_is_no_answer(self, value: Any, tmp_path: Path):
        pefts(tmp_path, modules_to_save=["embed_tokens"])
        edit.change_config(tmp_path, ensure_weight_tying=value)
        refuse(tmp_path, "not true or false", model=tied_llama())

    def test_factors_that_peft_would_put_on_both_are_refused(self, tmp_path: Path):
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True
        )
        peft.get_peft_model(tied_llama(), config).save_pretrained(tmp_path)
        keys = [key for key in edit.read_tensors(tmp_path)[0] if "embed" in key]
        assert keys
        with pytest.raises((UnsupportedAdapterError, AdapterFileError)):
            hf_lora.load(tied_llama(), tmp_path)


def header(folder: Path) -> dict[str, Any]:
    return json.loads(edit.read_tensors(folder)[1]["hf_lora"])


def rewrite(folder: Path, tensors: edit.Tensors | None = None, **entries: Any) -> None:
    """Write a file of ours with other tensors, or other entries of its header."""
    text = json.dumps(header(folder) | entries)
    there = edit.read_tensors(folder)[0] | (tensors or {})
    edit.write_tensors(folder, there, {"format": "pt", "hf_lora": text})


class TestContradictions:
    def test_two_values_for_one_tensor(self, tmp_path: Path):
        saved(LLAMA, ["lm_head"], tmp_path)

        rewrite(tmp_path, {HEAD: edit.read_tensors(tmp_path)[0][HEAD] + 1})
        words = f"{HEAD} and {EMBED} are one tensor in this adapter, and differ"
        refuse(tmp_path, words, error=AdapterMismatchError, model=tied_llama())

    def test_a_json_that_says_otherwise(self, tmp_path: Path):
        saved(LLAMA, ["lm_head"], tmp_path)
        edit.change_config(tmp_path, ensure_weight_tying=False)
        refuse(tmp_path, "ensure_weight_tying = False, in the header True", model=tied_llama())

    @pytest.mark.parametrize(
        ("ties", "words"),
        [
            (3, "damaged"),
            ({"lm_head.weight": 3}, "damaged"),
            ({"a": "b", "b": "c"}, "damaged"),
            ({"lm_head.weight": "nothing.weight"}, "nothing.weight is tied to another, and"),
            ({"nothing": "lm_head.weight"}, "is tied to another"),
            ({"model.norm.weight": "lm_head.weight"}, "are one tensor, and in the model"),
            ({Q.format(0): Q.format(1)}, "it has factors as well"),
        ],
    )
    def test_a_header_that_ties_what_cannot_be(self, ties: Any, words: str, tmp_path: Path):
        saved(LLAMA, ["lm_head"], tmp_path)
        rewrite(tmp_path, ties=ties)
        refuse(tmp_path, words, error=hf_lora.HfLoRAError, model=tied_llama())

    def test_an_older_reader_is_told_that_it_would_be_wrong(self, tmp_path: Path):
        saved(LLAMA, ["lm_head"], tmp_path)
        assert "ties" in header(tmp_path)["requires"]
        assert header(tmp_path)["ties"] == {"lm_head.weight": "model.embed_tokens.weight"}
        model = hf_lora.wrap(llama(), "q_proj", r=2, train=["lm_head"])
        hf_lora.save(model, tmp_path / "untied")
        assert "ties" not in header(tmp_path / "untied")

    def test_an_old_file_of_ours_is_untied_as_it_was_trained(self, tmp_path: Path):
        """Copies of a tied pair had nothing to do with each other."""
        model = hf_lora.wrap(llama(), "q_proj", r=2, train=["embed_tokens"])
        scramble(model)
        hf_lora.save(model, tmp_path)
        base = tied_llama()
        again = hf_lora.load(base, tmp_path, check_base=False)
        assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
        assert not is_one(weights(again, LLAMA))
