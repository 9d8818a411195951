"""``del model`` frees a wrapped model at once, as it does a plain one: nothing of ours holds it."""

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import hf_lora
from tests.integrations import training
from tests.tiny import Net, rows


def bart() -> Any:
    """A model with a buffer of its own, the bias of its logits."""
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=16, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
            decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
        )
    )  # fmt: skip


def step_of_bart(model: Any) -> Any:
    """Train a step in which that bias moves."""
    model(X, labels=X).loss.backward()
    model.final_logits_bias.add_(1)
    with hf_lora.no_adapter(model):
        assert not model.final_logits_bias.any()
    return model


X = torch.tensor([[3, 5, 7, 9]])


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def step(model: Any) -> Any:
    """Train one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()(X, labels=X).loss.backward()
    optimizer.step()
    return model


def checkpointed(model: Any) -> Any:
    model.activation_checkpointing_enable()
    return step(model)


def with_a_second(model: Any) -> Any:
    hf_lora.add_adapter(model, "fr", targets="o_proj", r=2)
    with hf_lora.use_adapter(model, "fr"):
        model(X)
    return hf_lora.delete_adapter(model, "fr")


def generating(model: Any) -> Any:
    model.eval().generate(X, max_new_tokens=2, do_sample=False, pad_token_id=0)
    return model


def interrupted(model: Any) -> Any:
    """Fail in the middle of a forward, where the outputs of other layers may be waiting."""
    layer = model.model.layers[0].self_attn.v_proj

    def fail(*_: Any) -> None:
        raise ArithmeticError

    step(model)
    hook = layer.register_forward_hook(fail)
    with contextlib.suppress(ArithmeticError):
        model(X.expand(64, -1))
    hook.remove()
    return model


USES: dict[str, Callable[[Any], Any]] = {
    "only wrapped": lambda model: model,
    "trained": step,
    "trained with checkpointing": checkpointed,
    "generated": generating,
    "merged": hf_lora.merge,
    "merged for good": lambda model: hf_lora.merge_and_unwrap(step(model)),
    "unwrapped": lambda model: hf_lora.unwrap(step(model)),
    "several adapters": with_a_second,
    "copied": lambda model: step(copy.deepcopy(model)),
    "pickled": lambda model: step(pickle.loads(pickle.dumps(model))),
    "a view of the base": hf_lora.base_view,
    "interrupted": interrupted,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("fields", [{}, {"train": ["lm_head"]}], ids=["factors", "and a head"])
def test_a_model_that_nobody_has_any_more_is_gone(use: Callable[[Any], Any], fields: dict):
    model = training.wrapped(**fields)
    with no_collection():
        used = use(model)
        kept = weakref.ref(model), weakref.ref(used), weakref.ref(used.lm_head)
        del model, used
        assert [reference() for reference in kept] == [None] * len(kept)


def test_one_that_was_saved_and_one_that_was_loaded(tmp_path: Path):
    with no_collection():
        model = step(training.wrapped())
        model.save_pretrained(tmp_path)
        loaded = hf_lora.load(training.llama(), tmp_path)
        loaded(X)
        kept = weakref.ref(model), weakref.ref(loaded)
        del model, loaded
        assert [reference() for reference in kept] == [None, None]


def test_a_model_that_is_no_transformers_model():
    with no_collection():
        model = hf_lora.wrap(Net(), ["q_proj", "v_proj"], r=2)
        model(rows()).sum().backward()
        kept = weakref.ref(model)
        del model
        assert kept() is None


@pytest.mark.parametrize(
    "again", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_its_methods_work_where_the_call_is_all_that_has_it(again: Callable, tmp_path: Path):
    model = training.wrapped(seed=5)
    expected = training.in_file_names(model)
    made = [again(model)]
    del model
    made.pop().save_pretrained(tmp_path)
    assert training.same(training.saved(tmp_path), expected)


def test_a_method_knows_what_became_of_its_model():
    model = training.wrapped()
    switch, names = model.set_adapter, model.active_adapters
    hf_lora.add_adapter(model, "fr", targets="o_proj", r=2)
    switch("fr")
    assert hf_lora.active_adapters(model) == ("fr",)
    del model
    assert names() == ["fr"]


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model,
        step_of_bart,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(step_of_bart(model))),
    ],
    ids=["wrapped", "trained", "copied", "trained and pickled"],
)
def test_a_model_that_has_buffers_itself(use: Callable[[Any], Any]):
    """What is kept of them, to see that they move, keeps no model alive."""
    model = bart()
    model.train()
    hf_lora.wrap(model, "q_proj", r=2)
    with no_collection():
        used = use(model)
        kept = weakref.ref(model), weakref.ref(used)
        del model, used
        assert [reference() for reference in kept] == [None, None]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "embedding": lambda: nn.Embedding(9, 4),
    "convolution": lambda: nn.Conv1d(4, 4, 1),
}


def called(model: Any) -> Any:
    """Take a step, in a block and out of one."""
    x = torch.tensor([3]) if isinstance(model, nn.Embedding) else torch.ones(4, 4)
    with hf_lora.no_adapter(model):
        model(x)
    model(x).sum().backward()
    return model


LAYER_USES: dict[str, Callable[[Any], Any]] = {
    "only wrapped": lambda model: model,
    "called": called,
    "copied": lambda model: called(copy.deepcopy(called(model))),
    "pickled": lambda model: called(pickle.loads(pickle.dumps(called(model)))),
    "unwrapped": lambda model: hf_lora.unwrap(called(model)),
    "merged for good": lambda model: hf_lora.merge_and_unwrap(called(model)),
    "merged and unmerged": lambda model: hf_lora.unmerge(hf_lora.merge(called(model))),
}


@pytest.mark.parametrize("use", LAYER_USES.values(), ids=LAYER_USES.keys())
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_that_is_the_whole_model(make: Callable[[], nn.Module], use: Callable[[Any], Any]):
    model = hf_lora.wrap(make(), targets=r".*", r=2)
    with no_collection():
        used = use(model)
        kept = weakref.ref(model), weakref.ref(used)
        del model, used
        assert [reference() for reference in kept] == [None, None]
