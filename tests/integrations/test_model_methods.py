"""A wrapped model is still the transformers model that it was, whatever one does with it."""

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import PreTrainedModel, Trainer, pipeline

import hf_lora
from hf_lora.errors import StateError, UnknownAdapterError
from hf_lora.integrations.trainer import patch as trainer_patch
from hf_lora.kinds.lora import LoRALayer
from hf_lora.model.registry import wrapped as with_registry
from tests.integrations import training
from tests.integrations.training import adapter_tensors, base_tensors, same
from tests.snapshot import low_rank

X = torch.tensor([[3, 5, 7, 9]])


def loud(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    return model.eval()


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class TestCopies:
    @pytest.fixture(params=[copy.deepcopy, through_pickle, through_torch])
    def pair(self, request: pytest.FixtureRequest) -> tuple[Any, Any]:
        model = loud(training.wrapped())
        hf_lora.add_adapter(model, "fr", targets="o_proj", r=2)
        return model, request.param(model)

    def test_a_copy_answers_the_same_with_tensors_of_its_own(self, pair: tuple[Any, Any]):
        model, twin = pair
        assert torch.equal(model(X).logits, twin(X).logits)
        assert same(adapter_tensors(model), adapter_tensors(twin))
        shared = {p.data_ptr() for p in model.parameters()}
        assert not shared & {p.data_ptr() for p in twin.parameters()}

    def test_its_methods_are_its_own(self, pair: tuple[Any, Any], tmp_path: Path):
        model, twin = pair
        with torch.no_grad():
            twin.model.layers[0].self_attn.q_proj.lora_A.zero_()
        twin.save_pretrained(tmp_path)
        assert same(training.saved(tmp_path), training.in_file_names(twin))
        assert not same(training.saved(tmp_path), training.in_file_names(model))
        assert training.files(tmp_path) == {
            f"{folder}adapter_{rest}"
            for folder in ("", "fr/")
            for rest in ("config.json", "model.safetensors")
        }

    def test_its_adapters_are_its_own(self, pair: tuple[Any, Any]):
        model, twin = pair
        hf_lora.activate(twin, "fr")
        assert hf_lora.active_adapters(model) == ("default",)
        hf_lora.unwrap(twin)
        assert torch.equal(twin(X).logits, training.llama().eval()(X).logits)
        assert not torch.equal(model(X).logits, twin(X).logits)

    def test_it_trains_and_resumes(self, pair: tuple[Any, Any], tmp_path: Path):
        _, twin = pair
        hf_lora.delete_adapter(twin, "fr")
        trainer = training.trainer(twin, tmp_path, max_steps=2, save_steps=1)
        trainer.train()
        end = adapter_tensors(twin)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert same(adapter_tensors(twin), end)


def test_a_pickled_model_brings_the_patch_of_trainer(monkeypatch: pytest.MonkeyPatch):
    """In a process that has wrapped nothing itself."""
    content = pickle.dumps(training.wrapped())
    trainer_patch.disable()
    monkeypatch.setattr(trainer_patch, "_enabled", True)
    assert not hasattr(Trainer.train, "__wrapped__")
    pickle.loads(content)
    assert hasattr(Trainer.train, "__wrapped__")


class TestCounting:
    def test_what_trains(self):
        model = training.wrapped()
        q_proj, v_proj, down_proj = (32, 32), (32, 16), (48, 32)
        factors = 2 * 4 * sum(a + b for a, b in (q_proj, v_proj, down_proj))
        assert model.num_parameters(only_trainable=True) == factors
        assert model.num_parameters() == training.llama().num_parameters() + factors
        grown = model.get_memory_footprint() - training.llama().get_memory_footprint()
        assert grown == 4 * factors


class TestNumberTypes:
    @pytest.mark.parametrize(
        ("convert", "dtype"),
        [
            (lambda model: model.half(), torch.float16),
            (lambda model: model.to(torch.bfloat16), torch.bfloat16),
            (lambda model: model.double(), torch.float64),
        ],
    )
    def test_the_whole_model_follows(self, convert: Any, dtype: torch.dtype, tmp_path: Path):
        model = loud(training.wrapped())
        before = model(X).logits
        assert convert(model) is model
        assert {p.dtype for p in model.parameters()} == {dtype}
        torch.testing.assert_close(model(X).logits.float(), before, rtol=0.05, atol=0.02)
        model.save_pretrained(tmp_path)
        if dtype is not torch.float64:  # the format has no such adapters
            assert same(training.saved(tmp_path), training.in_file_names(model))


class TestGeneration:
    def test_generate_uses_the_adapter(self):
        model = loud(training.wrapped())
        out = model.generate(X, max_new_tokens=5, do_sample=False, pad_token_id=0)
        tokens = X
        for _ in range(5):  # greedy, without a cache
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(out, tokens)
        with hf_lora.no_adapter(model):
            assert not torch.equal(
                model.generate(X, max_new_tokens=5, do_sample=False, pad_token_id=0), out
            )

    def test_a_pipeline_takes_it(self):
        model = training.llama(vocab_size=len(training.WORDS), pad_token_id=0, eos_token_id=1)
        hf_lora.wrap(model, "q_proj", r=4)
        made = pipeline("text-generation", model=loud(model), tokenizer=training.tokenizer())
        answer = made("the cat", max_new_tokens=4, do_sample=False, return_full_text=True)
        assert made.model is model
        assert answer[0]["generated_text"].startswith("the cat")


class TestEmbeddings:
    def test_resized_before_wrapping_they_are_part_of_the_base(self, tmp_path: Path):
        model = training.llama()
        model.resize_token_embeddings(60)
        loud(hf_lora.wrap(model, "q_proj", r=4)).save_pretrained(tmp_path)
        other = training.llama()
        other.resize_token_embeddings(60)
        other.load_state_dict(base_tensors(model))
        hf_lora.load(other, tmp_path)
        assert torch.equal(other.eval()(X).logits, model(X).logits)
        assert other(X).logits.shape[-1] == 60

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("targets", ["q_proj", "lm_head", ["q_proj", "embed_tokens"]])
    def test_resizing_a_wrapped_model_is_refused(self, tied: bool, targets: Any):
        model = training.llama(tie_word_embeddings=tied)
        if "embed_tokens" in targets:
            hf_lora.wrap(model, "q_proj", train=["embed_tokens"], r=4)
        else:
            hf_lora.wrap(model, targets, r=4)
        adapters, base = adapter_tensors(model), base_tensors(model)
        for call in ({"new_num_tokens": 60}, {"new_num_tokens": 40}, {"pad_to_multiple_of": 64}):
            with pytest.raises(StateError, match="Resize first, then wrap"):
                model.resize_token_embeddings(**call)
        assert same(adapter_tensors(model), adapters)
        assert same(base_tensors(model), base)

    def test_what_changes_nothing_is_allowed(self):
        """Trainers and tokenizers call it to be sure."""
        model = training.wrapped()
        embeddings = model.get_input_embeddings()
        for call in ({}, {"new_num_tokens": 48}, {"pad_to_multiple_of": 16}):
            assert model.resize_token_embeddings(**call) is embeddings
        hf_lora.unwrap(model)
        assert model.resize_token_embeddings(60).num_embeddings == 60

    @pytest.mark.parametrize("targets", ["q_proj", "lm_head"])
    def test_tie_weights_ties_and_keeps_the_adapter(self, targets: str):
        model = loud(hf_lora.wrap(training.llama(tie_word_embeddings=True), targets, r=4))
        before, logits = adapter_tensors(model), model(X).logits
        model.tie_weights()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert same(adapter_tensors(model), before)
        assert torch.equal(model(X).logits, logits)

    def test_init_weights_leaves_the_adapter_alone(self):
        model = loud(training.wrapped(train=["lm_head"]))
        before = adapter_tensors(model)
        model.init_weights()
        assert same(adapter_tensors(model), before)


class TestMethods:
    def test_the_class_keeps_its_own(self):
        model = training.wrapped()
        assert type(model).save_pretrained is PreTrainedModel.save_pretrained
        assert hf_lora.unwrap(model).save_pretrained.__func__ is PreTrainedModel.save_pretrained

    def test_signatures_can_be_read(self):
        names = list(inspect.signature(training.wrapped().save_pretrained).parameters)
        assert names[:3] == ["save_directory", "is_main_process", "state_dict"]

    def test_switching_by_transformers_names(self):
        model = loud(training.wrapped())
        with_adapter = model(X).logits
        model.disable_adapters()
        base = model(X).logits
        assert torch.equal(base, training.llama().eval()(X).logits)
        model.enable_adapters()
        assert torch.equal(model(X).logits, with_adapter)
        model.add_adapter(hf_lora.LoRAConfig(targets="o_proj", r=2), "fr")
        assert model.active_adapters() == ["fr"]
        model.set_adapter(["default", "fr"])
        assert model.active_adapters() == ["default", "fr"]
        assert model.get_adapter_state_dict("fr").keys() == {
            f"model.layers.{n}.self_attn.o_proj.lora_{factor}_fr" for n in (0, 1) for factor in "AB"
        }
        model.delete_adapter("fr")
        assert model.active_adapters() == ["default"]
        with pytest.raises(UnknownAdapterError):
            model.set_adapter("fr")

    def test_load_adapter(self, tmp_path: Path):
        saved = loud(training.wrapped(seed=5))
        saved.save_pretrained(tmp_path)
        model = training.wrapped()
        model.load_adapter(tmp_path, "other")
        assert model.active_adapters() == ["other"]
        assert torch.equal(model.eval()(X).logits, saved(X).logits)

    def test_pefts_configuration_is_taken_and_another_methods_refused(self):
        model = training.wrapped()
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "fr")
        assert hf_lora.adapters(model)["fr"].targets == ("q_proj",)
        assert model.active_adapters() == ["fr"]
        with pytest.raises(hf_lora.ConfigError, match="'IA3'"):
            model.add_adapter(peft.IA3Config(target_modules=["q"], feedforward_modules=[]), "de")
        with pytest.raises(hf_lora.ConfigError, match="not a LoRAConfig"):
            model.add_adapter({"r": 2}, "de")

    @pytest.mark.parametrize(
        "arguments",
        [
            {"safe_serialization": False},
            {"variant": "fp16"},
            {"save_peft_format": False},
            {"state_dict": {}},
            {"state_dict": {"lm_head.weight": torch.zeros(1)}},
            {"state_dict": {"module.lm_head.weight": torch.zeros(1)}},
        ],
    )
    def test_what_cannot_be_saved_writes_nothing(self, tmp_path: Path, arguments: dict):
        with pytest.raises(StateError):
            training.wrapped().save_pretrained(tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()

    def test_an_unknown_argument_is_named(self, tmp_path: Path):
        with pytest.raises(TypeError, match="colour"):
            training.wrapped().save_pretrained(tmp_path, colour="red")

    def test_only_the_main_process_writes(self, tmp_path: Path):
        training.wrapped().save_pretrained(tmp_path / "new", is_main_process=False)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
    def test_a_gathered_state_dict_is_what_is_saved(self, tmp_path: Path, prefix: str):
        model, other = training.wrapped(), loud(training.wrapped(seed=5))
        state = {f"{prefix}{name}": tensor for name, tensor in other.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=state)
        assert same(training.saved(tmp_path), training.in_file_names(other))


def test_a_wrapped_layer_is_found_by_its_class():
    model = training.wrapped()
    found = [m for m in model.modules() if isinstance(m, LoRALayer)]
    assert found == list(low_rank(with_registry(model)[1]).values())
