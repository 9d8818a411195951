"""Tied embeddings that an adapter trains: Trainer's checkpoints, loading by name, engines."""

from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import hf_lora
from hf_lora import AdapterMismatchError
from hf_lora.adapter_io.load import restore
from hf_lora.merging.hand_over import merged_tensors
from hf_lora.model.registry import registry_of
from tests.files import edit
from tests.integrations import training
from tests.tiny import scramble

TIED = {"tie_word_embeddings": True}
X = torch.arange(1, 13).view(2, 6)


def wrapped(train: str = "lm_head", seed: int = 1, **fields: bool) -> nn.Module:
    return training.wrapped(seed, fields=TIED | fields, train=[train])


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(X).logits


@pytest.mark.parametrize("train", ["lm_head", "embed_tokens"])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path: Path, train: str):
    through = training.run(tmp_path / "through", model=wrapped(train))
    middle = str(tmp_path / "through" / "checkpoint-4")
    resumed = training.run(tmp_path / "resumed", middle, wrapped(train, seed=5))
    tensors = [training.adapter_tensors(run.model) for run in (through, resumed)]
    assert training.same(*tensors)
    for run in (through, resumed):
        model = run.model
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert training.same(run.base_before, training.base_tensors(model))
    held = [p for group in through.trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len({*map(id, held)})
    expected = logits(through.model)
    again = hf_lora.load(training.llama(**TIED), tmp_path / "through" / "checkpoint-8")
    assert torch.equal(logits(again), expected)


def test_the_best_is_loaded_at_the_end(tmp_path: Path):
    run = training.run(
        tmp_path,
        model=wrapped(),
        eval_dataset=training.tokens(4, seed=8),
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        greater_is_better=True,  # of the loss, so that it is not the last that is the best
    )
    best = run.trainer.state.best_model_checkpoint
    there, here = training.saved(best), training.in_file_names(run.model)
    assert all(torch.equal(there[key], value) for key, value in here.items())
    assert run.model.lm_head.weight is run.model.model.embed_tokens.weight


def test_a_checkpoint_that_was_trained_untied_is_another_adapter(tmp_path: Path):
    model = wrapped()
    hf_lora.save(model, tmp_path)
    edit.as_pefts(tmp_path, ensure_weight_tying=False)
    before = training.adapter_tensors(model)
    with pytest.raises(AdapterMismatchError, match=r"tied to other tensors: \['lm_head.weight'\]"):
        restore(model, registry_of(model), {"default": tmp_path})
    assert training.same(training.adapter_tensors(model), before)
    hf_lora.load(model, tmp_path, replace=True)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_from_pretrained_opens_it_by_name(tmp_path: Path):
    training.llama(**TIED).save_pretrained(tmp_path / "base")
    base = type(training.llama()).from_pretrained(tmp_path / "base")
    model = hf_lora.wrap(base, "q_proj", r=2, train=["lm_head"])
    scramble(model)
    model.save_pretrained(tmp_path / "adapter")
    again = hf_lora.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("train", ["lm_head", "embed_tokens"])
def test_added_tokens_are_in_the_file_whichever_end_is_named(tmp_path: Path, train: str):
    training.llama(**TIED).save_pretrained(tmp_path / "base")
    base = type(training.llama()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(60)
    model = hf_lora.wrap(base, "q_proj", r=2, train=[train])
    scramble(model)
    hf_lora.save(model, tmp_path / "adapter")  # a warning would be an error here
    again = hf_lora.from_pretrained(tmp_path / "adapter")
    assert again.get_input_embeddings().num_embeddings == 60
    assert torch.equal(logits(again), logits(model))


def test_an_engine_gets_the_merged_tensor_once():
    model = wrapped()
    scramble(model)
    found = dict(merged_tensors(model))
    assert "lm_head.weight" not in found
    assert torch.equal(found["model.embed_tokens.weight"], model.lm_head.weight)
    plain = training.llama(**TIED)
    plain.load_state_dict(found, strict=False)
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)


def test_one_strength_for_a_mixture_of_two_that_train_it():
    model = wrapped()
    hf_lora.add_adapter(model, "b", "q_proj", r=2, train=["embed_tokens"])
    scramble(model)
    copies = {
        name: next(p for key, p in registry_of(model).parameters(name) if "lora_copy" in key)
        for name in ("default", "b")
    }
    hf_lora.activate(model, {"default": 0.25, "b": 0.75})
    expected = 0.25 * copies["default"] + 0.75 * copies["b"]
    for end in (model.lm_head, model.model.embed_tokens):
        assert torch.allclose(end.weight, expected, atol=1e-6)
    before = logits(model)
    hf_lora.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(logits(model), before, atol=1e-5)


def gradient(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of the one copy, by a backward outside of any choice of adapters."""
    loss.backward()
    ((_, copied),) = [each for each in registry_of(model).parameters("a") if "copy" in each[0]]
    found, copied.grad = copied.grad, None
    return found


def test_a_loss_that_reads_the_heads_weight_sees_the_copy():
    """As fused losses do: the head itself is never called."""
    model = hf_lora.wrap(training.llama(**TIED), "q_proj", r=2, train=["embed_tokens"], adapter="a")
    scramble(model)
    expected = gradient(model, model(X, labels=X).loss)
    hidden = model.model(X).last_hidden_state[:, :-1]
    loss = nn.functional.cross_entropy(
        (hidden @ model.lm_head.weight.T).flatten(0, 1), X[:, 1:].flatten()
    )
    torch.testing.assert_close(gradient(model, loss), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_an_adapter_that_was_in_use_in_the_forward(reentrant: bool):
    """Of two adapters one trains the tie; also what is checkpointed reads the copy."""
    model = hf_lora.wrap(training.llama(**TIED), "q_proj", r=2)
    hf_lora.add_adapter(model, "a", "q_proj", r=2, train=["lm_head"])
    scramble(model)
    expected = {}
    for checkpointed in (False, True):

        def end(ids: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return model.lm_head(model.model.norm(model.model.embed_tokens(ids) + bias))

        bias = torch.zeros(32, requires_grad=True)
        with hf_lora.use_adapter(model, "a"):
            out = (
                torch.utils.checkpoint.checkpoint(end, X, bias, use_reentrant=reentrant)
                if checkpointed
                else end(X, bias)
            )
        expected[checkpointed] = gradient(model, out.square().mean())
    assert torch.equal(expected[True], expected[False])
