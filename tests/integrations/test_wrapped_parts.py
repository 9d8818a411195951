"""A part of a model that is wrapped: what the whole saves, trains and loads is the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_lora
from hf_lora.errors import GradientError, StateError
from hf_lora.integrations.trainer.callback import GradientCheck
from hf_lora.model.registry import find
from tests.integrations import training
from tests.integrations.training import CHECKPOINT, same, trainer

X = torch.tensor([[3, 5, 7, 9]])
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    training.llama().save_pretrained(folder)
    return folder


def part_wrapped(base: Path, seed: int = 1, frozen: bool = True, **fields: Any) -> Any:
    """A language model of which the layers below the head are wrapped."""
    model = LlamaForCausalLM.from_pretrained(base).requires_grad_(not frozen)
    with training.seeded(seed):
        hf_lora.wrap(model.model, **{"targets": ["q_proj", "v_proj"], "r": 4, **fields})
    return model


@torch.no_grad()
def loud(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_B", "lora_copy_weight")):
            parameter.add_(0.1)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(X).logits


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_a_head_outside_that_is_tied_with_what_trains_inside(tmp_path: Path):
    """The part cannot know of it, and the head would go on with the base's weights."""
    model = training.llama(tie_word_embeddings=True)
    hf_lora.wrap(model.model, "q_proj", r=4, train=["embed_tokens"])
    words = "lm_head is tied with model.embed_tokens"
    with pytest.raises(StateError, match=words):
        model.save_pretrained(tmp_path)
    with pytest.raises(StateError, match=words):
        trainer(model, tmp_path, max_steps=1).train()
    hf_lora.unwrap(model.model)
    hf_lora.wrap(model.model, "q_proj", r=4, train=["norm"])
    model.save_pretrained(tmp_path)


class TestSaving:
    def test_the_adapter_has_its_names_in_the_whole(self, base: Path, tmp_path: Path):
        model = loud(part_wrapped(base, train=["norm"]))
        model.save_pretrained(tmp_path)
        assert training.files(tmp_path) == ADAPTER
        want = logits(model)
        assert torch.equal(logits(hf_lora.from_pretrained(tmp_path)), want)
        assert torch.equal(
            logits(hf_lora.load(LlamaForCausalLM.from_pretrained(base), tmp_path)), want
        )
        theirs = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(tmp_path)
        )
        torch.testing.assert_close(logits(theirs), want, rtol=1e-5, atol=1e-6)

    def test_what_its_own_class_opens_is_not_the_base(self, base: Path, tmp_path: Path):
        model = loud(part_wrapped(base))
        model.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path)  # through PEFT
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)

    def test_from_a_state_dict_that_was_gathered(self, base: Path, tmp_path: Path):
        model = loud(part_wrapped(base))
        gathered = {name: tensor * 2 for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=gathered)
        key = "model.layers.0.self_attn.q_proj.lora_B"
        saved = training.saved(tmp_path)[f"base_model.model.{key}.weight"]
        assert torch.equal(saved, gathered[key])

    def test_the_part_alone_is_saved_as_ever(self, base: Path, tmp_path: Path):
        model = loud(part_wrapped(base))
        model.model.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(base)
        hf_lora.load(again.model, tmp_path)
        assert torch.equal(logits(again), logits(model))

    def test_what_trains_outside_of_the_part_would_be_lost(self, base: Path, tmp_path: Path):
        model = part_wrapped(base, frozen=False)
        with pytest.raises(StateError, match=r"would be lost:\n  - lm_head\.weight\n"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_two_parts_that_are_wrapped_apart_are_refused(self, base: Path, tmp_path: Path):
        model = LlamaForCausalLM.from_pretrained(base)
        for layer in model.model.layers:
            hf_lora.wrap(layer, ["q_proj"], r=2)
        match = r"model\.layers\.0 and model\.layers\.1 of this LlamaForCausalLM are wrapped each"
        with pytest.raises(StateError, match=match):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_part_of_a_wrapped_model_is_refused(self, base: Path, tmp_path: Path):
        model = training.wrapped()
        with pytest.raises(StateError, match="carries an adapter of a model around it"):
            model.model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_merged_for_good_it_is_a_plain_model(self, base: Path, tmp_path: Path):
        model = loud(part_wrapped(base))
        want = logits(model)
        hf_lora.merge_and_unwrap(model.model)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(
            logits(LlamaForCausalLM.from_pretrained(tmp_path)), want, rtol=1e-4, atol=1e-5
        )

    def test_by_the_class_a_wrapped_model_saves_its_adapter(self, tmp_path: Path):
        model = training.wrapped()
        LlamaForCausalLM.save_pretrained(model, tmp_path)
        assert training.files(tmp_path) == ADAPTER


class TestTrainer:
    def test_a_checkpoint_is_the_adapter_and_a_resumed_run_is_equal(
        self, base: Path, tmp_path: Path
    ):
        first, second = part_wrapped(base), part_wrapped(base, seed=9)
        made = trainer(first, tmp_path / "first")
        made.train()
        assert training.files(tmp_path / "first" / "checkpoint-4") == CHECKPOINT
        assert any(isinstance(c, GradientCheck) for c in made.callback_handler.callbacks)
        checkpoint = str(tmp_path / "first" / "checkpoint-4")
        trainer(second, tmp_path / "second").train(resume_from_checkpoint=checkpoint)
        assert same(tensors(first), tensors(second))
        opened = hf_lora.from_pretrained(tmp_path / "first" / "checkpoint-8")
        assert torch.equal(logits(opened), logits(first))

    def test_the_best_one_is_loaded_at_the_end(self, base: Path, tmp_path: Path):
        scores = iter([0.9, 0.1])
        model = part_wrapped(base)
        trainer(
            model,
            tmp_path,
            eval_dataset=training.tokens(4, seed=8),
            compute_metrics=lambda _: {"score": next(scores)},
            eval_strategy="steps",
            eval_steps=4,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
        ).train()
        assert torch.equal(
            logits(model), logits(hf_lora.from_pretrained(tmp_path / "checkpoint-4"))
        )

    def test_what_trains_outside_stops_it_before_the_first_step(self, base: Path, tmp_path: Path):
        model = part_wrapped(base, frozen=False)
        before = tensors(model)
        with pytest.raises(StateError, match="would be lost"):
            trainer(model, tmp_path).train()
        assert same(tensors(model), before)
        trainer(model, tmp_path, save_strategy="no", max_steps=3).train()
        assert not same(tensors(model), before)

    def test_a_run_that_would_change_nothing_is_stopped(self, base: Path, tmp_path: Path):
        model = part_wrapped(base)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with pytest.raises(GradientError, match="Nothing would train"):
            trainer(model, tmp_path).train()


class Net(nn.Module, PyTorchModelHubMixin):
    """A model of somebody's own, with huggingface_hub's way to save and load it."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(torch.tanh(self.q_proj(x)))


class TestHubMixin:
    """It loads without being strict, so that a full save with ours in it would load as the base."""

    def test_a_wrapped_model_saves_its_adapter(self, tmp_path: Path):
        Net().save_pretrained(tmp_path / "base")
        model = hf_lora.wrap(Net.from_pretrained(tmp_path / "base"), "q_proj", r=2)
        with torch.no_grad():
            model.q_proj.lora_B.add_(0.1)
        model.save_pretrained(tmp_path / "adapter")
        assert training.files(tmp_path / "adapter") == ADAPTER
        again = hf_lora.load(Net.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        x = torch.randn(2, 8)
        assert torch.equal(again(x), model(x))
        with pytest.raises(FileNotFoundError):
            Net.from_pretrained(tmp_path / "adapter")
        assert find(hf_lora.unwrap(model)) is None
        assert "save_pretrained" not in vars(model)

    def test_so_does_one_of_which_a_part_is_wrapped(self, tmp_path: Path):
        class Outer(nn.Module, PyTorchModelHubMixin):
            def __init__(self) -> None:
                super().__init__()
                self.net = Net()

        model = Outer().requires_grad_(False)
        hf_lora.wrap(model.net, "q_proj", r=2)
        model.save_pretrained(tmp_path)
        assert training.files(tmp_path) == ADAPTER
        assert set(training.saved(tmp_path)) == {
            f"base_model.model.net.q_proj.lora_{which}.weight" for which in "AB"
        }
