"""Trainer's options on a wrapped model, each against the same thing done by hand or without it."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainerCallback

import hf_lora
from tests.integrations import training
from tests.integrations.training import CHECKPOINT, Gradients, adapter_tensors, base_tensors, same


def train(folder: Path, model: Any = None, **fields: Any) -> Trainer:
    trainer = training.trainer(training.wrapped() if model is None else model, folder, **fields)
    trainer.train()
    return trainer


def first_gradients(folder: Path, **fields: Any) -> dict[str, torch.Tensor]:
    """The gradients of the first optimizer step, without dropout."""
    gradients = Gradients()
    train(folder, training.wrapped(dropout=0.0), max_steps=1, callbacks=[gradients], **fields)
    return gradients.kept


class TestLabelSmoothing:
    FACTOR = 0.3

    def by_hand(self, model: Any, batch: dict[str, torch.Tensor], shift: int) -> torch.Tensor:
        """Cross entropy against labels that give ``FACTOR`` of their weight to all words evenly."""
        logits = model(input_ids=batch["input_ids"]).logits
        logits, labels = logits[:, : logits.shape[1] - shift], batch["labels"][:, shift:]
        return F.cross_entropy(
            logits.reshape(-1, training.VOCABULARY),
            labels.reshape(-1),
            ignore_index=-100,
            label_smoothing=self.FACTOR,
        )

    def test_labels_are_shifted_as_for_the_plain_class(self, tmp_path: Path):
        model = training.wrapped(dropout=0.0)
        trainer = training.trainer(model, tmp_path, label_smoothing_factor=self.FACTOR)
        trainer.train()
        batch = trainer.data_collator(training.tokens(4))
        loss = trainer.compute_loss(model, dict(batch))
        torch.testing.assert_close(loss, self.by_hand(model, batch, shift=1), rtol=1e-5, atol=0)
        assert abs(loss - self.by_hand(model, batch, shift=0)) > 1e-3


def test_neftune_adds_noise_while_training_and_leaves_nothing(tmp_path: Path, plain: dict):
    model = training.wrapped(dropout=0.0)
    embedding = model.get_input_embeddings()
    gradients, noise = Gradients(), []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            embedding.register_forward_hook(lambda m, x, y: noise.append(y - m.weight[x[0]]))

    watched = train(
        tmp_path,
        model,
        max_steps=1,
        neftune_noise_alpha=5.0,
        callbacks=[gradients, Watch()],
    )
    assert all(difference.abs().max() > 0 for difference in noise)
    assert gradients.kept.keys() == plain.keys()
    assert not same(gradients.kept, plain)
    assert len(embedding._forward_hooks) == 1  # the test's own
    noise.clear()
    model(**watched.data_collator(training.tokens(2)))
    assert noise[0].abs().max() == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The first gradients without any option."""
    return first_gradients(tmp_path_factory.mktemp("plain"))


class TestActivationCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradients_are_equal(self, tmp_path: Path, plain: dict, reentrant: bool):
        model = training.wrapped(dropout=0.0)
        gradients = Gradients()
        train(
            tmp_path,
            model,
            max_steps=1,
            callbacks=[gradients],
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        assert model.is_activation_checkpointing
        assert gradients.kept.keys() == adapter_tensors(model).keys()
        assert same(gradients.kept, plain)

    def test_with_dropout_the_recomputation_draws_the_same(self, tmp_path: Path):
        """Dropout of the adapter included: else the backward would be of another function."""
        with_it = train(tmp_path / "with", activation_checkpointing=True, max_steps=2)
        without = train(tmp_path / "without", max_steps=2)
        assert same(adapter_tensors(with_it.model), adapter_tensors(without.model))


def test_torch_compile_saves_and_resumes_the_same(tmp_path: Path):
    compiled = functools.partial(
        train, max_steps=2, save_steps=1, torch_compile=True, torch_compile_backend="eager"
    )
    first = compiled(tmp_path / "first", training.wrapped(dropout=0.0))
    assert type(first.model_wrapped).__name__ == "OptimizedModule"
    assert training.files(tmp_path / "first" / "checkpoint-1") == CHECKPOINT
    plain = train(tmp_path / "plain", training.wrapped(dropout=0.0), max_steps=2)
    for key, tensor in adapter_tensors(plain.model).items():
        torch.testing.assert_close(adapter_tensors(first.model)[key], tensor, rtol=0, atol=1e-6)
    second = training.trainer(
        training.wrapped(seed=9, dropout=0.0),
        tmp_path / "second",
        max_steps=2,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-1"))
    assert same(adapter_tensors(second.model), adapter_tensors(first.model))


def test_a_compiled_model_given_to_trainer(tmp_path: Path):
    """Trainer then hands the wrapper's state dict to save_pretrained, prefix and all."""
    columns = {"remove_unused_columns": False}  # Trainer cannot read a wrapper's signature
    inner = training.wrapped(dropout=0.0)
    first = training.trainer(torch.compile(inner, backend="eager"), tmp_path / "first", **columns)
    first.train()
    checkpoint = tmp_path / "first" / "checkpoint-4"
    assert training.files(checkpoint) == CHECKPOINT
    last = training.saved(tmp_path / "first" / "checkpoint-8")
    assert same(last, training.in_file_names(inner))
    other = training.wrapped(seed=9, dropout=0.0)
    second = training.trainer(torch.compile(other, backend="eager"), tmp_path / "second", **columns)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert same(adapter_tensors(other), adapter_tensors(inner))


class TestNumberTypes:
    def test_bf16_autocast_keeps_the_adapter_in_fp32(self, tmp_path: Path):
        trainer = train(tmp_path, bf16=True, max_steps=2, save_steps=2)
        saved = training.saved(tmp_path / "checkpoint-2")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        assert same(saved, training.in_file_names(trainer.model))
        plain = train(tmp_path / "fp32", max_steps=2)
        assert not same(adapter_tensors(trainer.model), adapter_tensors(plain.model))

    def test_a_bf16_base_resumes_to_the_bit(self, tmp_path: Path):
        def make(seed: int) -> Any:
            base = training.llama().to(torch.bfloat16)
            torch.manual_seed(seed)
            return hf_lora.wrap(base, ["q_proj", "down_proj"], r=4)

        first = train(tmp_path / "first", make(1), bf16=True)
        second = training.trainer(make(2), tmp_path / "second", bf16=True)
        second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
        assert same(adapter_tensors(second.model), adapter_tensors(first.model))
        assert {t.dtype for t in base_tensors(first.model).values()} == {torch.bfloat16}

    def test_a_4_bit_base_resumes_to_the_bit(self, tmp_path: Path):
        """Trainer refuses quantized models without adapters; ours passes its guard."""
        training.llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)

        def make(seed: int) -> Any:
            base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits)
            with training.seeded(seed):
                return hf_lora.wrap(base, ["q_proj", "down_proj"], r=4)

        first = train(tmp_path / "first", make(1))
        base = base_tensors(first.model)
        assert torch.uint8 in {tensor.dtype for tensor in base.values()}
        assert same(base, base_tensors(make(1)))
        second = training.trainer(make(9), tmp_path / "second")
        second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
        assert same(adapter_tensors(second.model), adapter_tensors(first.model))

    @pytest.mark.skipif(
        not torch.cuda.is_available(), reason="Trainer's fp16 needs a GPU: it scales the loss there"
    )
    def test_fp16_autocast(self, tmp_path: Path):
        trainer = train(tmp_path, fp16=True, use_cpu=False, max_steps=2, save_steps=2)
        assert same(
            training.saved(tmp_path / "checkpoint-2"),
            {k: v.cpu() for k, v in training.in_file_names(trainer.model).items()},
        )


class TestModelInit:
    def test_the_model_that_is_made_for_the_run_is_the_one_that_is_checked_and_saved(
        self, tmp_path: Path
    ):
        made: list[Any] = []

        def model_init() -> Any:
            made.append(training.wrapped(seed=len(made)))
            return made[-1]

        trainer = training.trainer(None, tmp_path, model_init=model_init)
        trainer.train()
        assert len(made) == 2
        assert trainer.model is made[1]
        saved = training.saved(tmp_path / "checkpoint-8")
        assert same(saved, training.in_file_names(made[1]))
        untouched = adapter_tensors(training.wrapped(seed=0))
        assert same(adapter_tensors(made[0]), untouched)

    def test_it_resumes(self, tmp_path: Path):
        first = training.trainer(None, tmp_path / "first", model_init=lambda: training.wrapped())
        first.train()
        second = training.trainer(
            None, tmp_path / "second", model_init=lambda: training.wrapped(seed=9)
        )
        second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
        assert same(adapter_tensors(second.model), adapter_tensors(first.model))


def test_auto_find_batch_size_starts_again_with_less(tmp_path: Path):
    """A batch of more than 2 rows does not fit; what torch then says is what accelerate reads."""
    model = training.wrapped()
    sizes: list[int] = []

    def too_large(module: Any, args: Any, kwargs: dict) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    model.register_forward_pre_hook(too_large, with_kwargs=True)
    trainer = train(
        tmp_path,
        model,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        auto_find_batch_size=True,
        max_steps=3,
        save_steps=3,
    )
    assert sizes[0] == 3
    assert set(sizes[-3:]) == {2}
    assert trainer.state.global_step == 3
    assert same(training.saved(tmp_path / "checkpoint-3"), training.in_file_names(model))


def test_a_group_of_optimizer_parameters_holds_the_adapter_alone(tmp_path: Path):
    trainer = train(tmp_path, max_steps=1)
    assert trainer.optimizer is not None
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    expected = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert held == expected
    assert len(held) == len(adapter_tensors(trainer.model))
