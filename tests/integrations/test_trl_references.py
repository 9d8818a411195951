"""The reference of TRL's trainers is the policy as the trainer received it, by itself."""

import importlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import hf_lora
from hf_lora.errors import HfLoRAWarning, StateError
from hf_lora.integrations import references
from hf_lora.integrations.in_front import is_in_front
from hf_lora.integrations.trainer.checks import check_ready
from hf_lora.layers.kind import Patched
from hf_lora.model.registry import wrapped as with_registry
from tests.integrations import training
from tests.integrations.training import adapter_tensors, same
from tests.integrations.trl_runs import (
    COMPLETIONS,
    PREFERENCES,
    PROMPTS,
    SENTENCES,
    make,
    reward,
    small,
    storages,
)

X = torch.tensor([[3, 5, 7, 9, 10]])
Make = Callable[..., Any]
SAMPLING = {"beta": 0.1, "max_completion_length": 6, "num_generations": 2}


def dpo(model: Any, folder: Path, **args: Any) -> Any:
    return make(DPOTrainer, DPOConfig, model, folder, PREFERENCES, args={"bf16": False, **args})


def kto(model: Any, folder: Path, **args: Any) -> Any:
    return make(KTOTrainer, KTOConfig, model, folder, COMPLETIONS, args={"bf16": False, **args})


def grpo(model: Any, folder: Path, **args: Any) -> Any:
    args = {**SAMPLING, "bf16": False, **args}
    return make(GRPOTrainer, GRPOConfig, model, folder, PROMPTS, reward_funcs=reward, args=args)


def rloo(model: Any, folder: Path, **args: Any) -> Any:
    args = {**SAMPLING, "bf16": False, **args}
    return make(RLOOTrainer, RLOOConfig, model, folder, PROMPTS, reward_funcs=reward, args=args)


@pytest.fixture(params=[dpo, kto, grpo, rloo], ids=lambda build: build.__name__)
def build(request: pytest.FixtureRequest) -> Make:
    """Each of the four trainers that have a reference."""
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base on disk: what TRL would load as the reference."""
    path = tmp_path_factory.mktemp("base")
    small().save_pretrained(path)
    return path


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def wrap(model: Any, seed: int = 1, **fields: Any) -> Any:
    with training.seeded(seed):
        return hf_lora.wrap(model, **{"targets": ["q_proj", "v_proj"], "r": 4, **fields})


@torch.no_grad()
def trained(model: Any, seed: int = 3, adapter: str = "default") -> Any:
    """Values of one adapter as a training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    _, registry = with_registry(model)
    for _, parameter in registry.parameters(adapter):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    was = model.training
    found = model.eval()(X).logits
    model.train(was)
    return found


def losses(trainer: Any) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


class TestFour:
    def test_it_is_the_base_in_memory_not_the_one_on_disk(
        self, build: Make, folder: Path, tmp_path: Path
    ):
        """As after supervised fine-tuning whose adapter was merged."""
        base = hf_lora.merge_and_unwrap(trained(wrap(loaded(folder))))
        want = logits(base)
        assert not torch.allclose(want, logits(loaded(folder)), atol=0.01)
        trainer = build(wrap(base, seed=5), tmp_path)
        assert torch.equal(logits(trainer.ref_model), want)
        assert not any(isinstance(module, Patched) for module in trainer.ref_model.modules())
        own = storages(base)
        assert all(own[name] == at for name, at in storages(trainer.ref_model).items())

    def test_it_is_the_adapter_as_it_came_and_stays_so(
        self, build: Make, folder: Path, tmp_path: Path
    ):
        model = trained(wrap(loaded(folder)))
        want = logits(model)
        trainer = build(model, tmp_path, max_steps=2, save_strategy="no")
        assert torch.equal(logits(trainer.ref_model), want)
        trainer.train()
        assert torch.equal(logits(trainer.ref_model), want)
        assert not torch.equal(logits(model), want)
        own, adapters = storages(model), adapter_tensors(model)
        twice = {n for n, at in storages(trainer.ref_model).items() if own[n] != at}
        assert twice == set(adapters)
        assert not any(p.requires_grad for p in trainer.ref_model.parameters())

    def test_a_plain_model_is_trls_affair(self, build: Make, folder: Path, tmp_path: Path):
        training.wrapped()
        model = loaded(folder)
        trainer = build(model, tmp_path)
        own = set(storages(model).values())
        assert own.isdisjoint(storages(trainer.ref_model).values())

    def test_a_model_of_which_a_part_is_wrapped(self, build: Make, folder: Path, tmp_path: Path):
        model = loaded(folder).requires_grad_(False)
        trained(wrap(model.model))
        want = logits(model)
        trainer = build(model, tmp_path)
        assert torch.equal(logits(trainer.ref_model), want)
        assert trainer.ref_model.lm_head.weight is model.lm_head.weight

    def test_merged_for_the_moment_it_is_refused(self, build: Make, folder: Path, tmp_path: Path):
        model = hf_lora.merge(trained(wrap(loaded(folder))))
        with pytest.raises(StateError, match="while default is merged"):
            build(model, tmp_path)


@pytest.mark.parametrize("start", ["fresh", "trained", "merged"])
def test_the_first_loss_of_dpo_is_ln_2(folder: Path, tmp_path: Path, start: str):
    model = wrap(loaded(folder))
    if start != "fresh":
        trained(model)
    if start == "merged":
        model = wrap(hf_lora.merge_and_unwrap(model), seed=5)
    trainer = dpo(model, tmp_path, max_steps=1, save_strategy="no")
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert trainer.state.log_history[0]["rewards/chosen"] == 0


class TestWhatThePolicyIs:
    def test_of_several_adapters_it_has_those_in_use(self, folder: Path, tmp_path: Path):
        model = trained(wrap(loaded(folder)))
        hf_lora.add_adapter(model, "fr", targets="o_proj", r=2)
        hf_lora.add_adapter(model, "de", targets="o_proj", r=2)
        trained(trained(model, adapter="fr"), adapter="de")
        hf_lora.activate(model, {"default": 0.5, "fr": 1.0})
        want = logits(model)
        reference = dpo(model, tmp_path).ref_model
        assert torch.equal(logits(reference), want)
        assert set(hf_lora.adapters(reference)) == {"default", "fr"}
        hf_lora.activate(model, "de")
        assert torch.equal(logits(reference), want)

    def test_a_head_trained_in_full_is_copied_once_it_differs(self, folder: Path, tmp_path: Path):
        model = wrap(loaded(folder), train=["lm_head"])
        fresh = dpo(model, tmp_path).ref_model
        assert (
            fresh.lm_head.weight
            is with_registry(model)[1].exclusive["lm_head"]._parameters["weight"]
        )
        again = wrap(loaded(folder), train=["lm_head"])
        with torch.no_grad():
            again.lm_head.weight.add_(0.1)
        want = logits(again)
        reference = dpo(again, tmp_path).ref_model
        assert torch.equal(logits(reference), want)
        assert reference.lm_head.weight.data_ptr() != again.lm_head.weight.data_ptr()

    def test_the_same_model_in_one_trainer_after_another(self, folder: Path, tmp_path: Path):
        """The first leaves a forward of its own on the model, which leads back to it."""
        model = wrap(loaded(folder))
        fields = {"max_steps": 2, "save_strategy": "no"}
        make(SFTTrainer, SFTConfig, model, tmp_path, SENTENCES, args=fields).train()
        want = logits(model)
        trainer = dpo(model, tmp_path, **fields)
        assert torch.equal(logits(trainer.ref_model), want)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
        assert torch.equal(logits(trainer.ref_model), want)

    def test_tied_weights_whose_head_is_computed_in_float32(self, tmp_path: Path):
        """GRPO casts the head in place, and with it the embeddings of both models."""
        base = training.llama(vocab_size=len(training.WORDS), tie_word_embeddings=True)
        base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
        model = wrap(loaded(tmp_path / "base"))
        fields = {"cast_lm_head_to_fp32": True, "max_steps": 1, "save_strategy": "no"}
        trainer = grpo(model, tmp_path, **fields)
        trainer.train()
        assert trainer.state.log_history[0]["kl"] == 0

    def test_no_name_is_needed(self, tmp_path: Path):
        """A model that was never on disk has no place from which TRL could load another."""
        model = trained(wrap(small()))
        assert torch.equal(logits(grpo(model, tmp_path).ref_model), logits(model))


class TestOtherTrainers:
    def test_a_copy_for_reference_shares_the_base(self, folder: Path):
        """A2PO and OnlineDPO make one, and so may anybody."""
        from trl.experimental.utils import create_reference_model

        model = trained(wrap(loaded(folder)))
        reference = create_reference_model(model)
        assert torch.equal(logits(reference), logits(model))
        assert reference.lm_head.weight is model.lm_head.weight
        plain = loaded(folder)
        copy = create_reference_model(plain)
        assert set(storages(copy).values()).isdisjoint(storages(plain).values())

    def test_a_teacher_that_follows_the_student_is_refused(self):
        """Its averages would be written into the base that both share."""
        args = types.SimpleNamespace(sync_ref_model=False, teacher_model_kind="ema")
        with pytest.raises(StateError, match="teacher_model_kind='ema' writes into the teacher"):
            check_ready(*with_registry(training.wrapped()), args)


class TestPartsOfTRL:
    """What hf_lora hooks into; a version without it is named here, and warned of in use."""

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("name", references._TRAINERS)
    def test_a_trainer_that_loads_its_reference(self, name: str):
        training.wrapped()
        module = importlib.import_module(name)
        trainer = getattr(module, references._TRAINERS[name])
        assert is_in_front(vars(trainer)["__init__"]), f"{name}: __init__"
        assert is_in_front(vars(module)["create_model_from_path"]), f"{name}: its loading"

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("name", references._COPYING)
    def test_a_module_that_copies_a_model(self, name: str):
        training.wrapped()
        module = importlib.import_module(name)
        assert is_in_front(vars(module)["create_reference_model"]), name

    def test_a_version_without_it_is_warned_of(self):
        module = types.ModuleType("trl.trainer.dpo_trainer")
        module.DPOTrainer = type("DPOTrainer", (), {})  # type: ignore[attr-defined]
        parts = "no DPOTrainer.__init__, create_model_from_path"
        with pytest.warns(
            HfLoRAWarning, match=f"trl.trainer.dpo_trainer of this version has {parts}"
        ):
            references._patch_trainer(module)
        module = types.ModuleType("trl.experimental.utils")
        with pytest.warns(HfLoRAWarning, match="has no create_reference_model"):
            references._patch_copying(module)


def test_a_model_of_other_tensors_is_not_taken_for_the_policy(folder: Path, tmp_path: Path):
    """What a trainer loads by another name while it is made stays what it is."""
    other = tmp_path / "other"
    small(seed=4).save_pretrained(other)

    class Curious(DPOTrainer):
        def add_callback(self, callback: Any) -> None:
            super().add_callback(callback)
            load = importlib.import_module("trl.trainer.dpo_trainer").create_model_from_path
            self.other = load(str(other))

    model = wrap(loaded(folder))
    args = {"bf16": False}
    trainer = make(Curious, DPOConfig, model, tmp_path / "out", PREFERENCES, args=args)
    assert torch.equal(logits(trainer.other), logits(LlamaForCausalLM.from_pretrained(other)))
    assert trainer.ref_model.lm_head.weight is model.lm_head.weight


def test_an_adapter_trained_before_is_the_reference_of_a_resumed_run(folder: Path, tmp_path: Path):
    """A run that is resumed is made anew, from the adapter that it began with."""
    model = trained(wrap(loaded(folder)))
    hf_lora.save(model, tmp_path / "sft")

    def begin(out: str) -> Any:
        start = hf_lora.load(loaded(folder), tmp_path / "sft", trainable=True)
        return dpo(start, tmp_path / out)

    first = begin("first")
    first.train()
    second = begin("second")
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert same(adapter_tensors(first.model), adapter_tensors(second.model))
