"""Layers that run a second time in the backward pass do what they did in their forward.

Whatever was chosen for the forward has ended when the backward pass begins. The oracle is the same
training without activation checkpointing.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._composable import checkpoint as checkpoint_in_place
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lora
from hf_lora import StateError
from hf_lora.compat.torch_checkpoint import keep_functions
from tests import forked
from tests.oracle.adapting import scramble
from tests.rounding import assert_rounded_alike
from tests.tiny import WIDTH, Net, rows

HOW = {"other": False, "reentrant": True}
TARGETS = ["q_proj", "v_proj", "up_proj", "gate_proj"]


def llama(how: bool | None, **fields: Any) -> Any:
    """Return a model with two adapters, "a" in use, checkpointed or not."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    model = hf_lora.wrap(LlamaForCausalLM(config), TARGETS, adapter="a", r=4, **fields)
    hf_lora.add_adapter(model, "b", TARGETS, r=3)
    scramble(model)
    if how is not None:
        kwargs = {"use_reentrant": how}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    return model.train()


def tokens(few: bool) -> torch.Tensor:
    shape = (2, 8) if few else (8, 30)  # on either side of what is computed in PyTorch's own way
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def by_activate(model: Any) -> Iterator[None]:
    hf_lora.activate(model, {"b": 0.5})
    yield
    hf_lora.activate(model, "a")


@contextlib.contextmanager
def under_autocast(model: Any) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), hf_lora.use_adapter(model, "b"):
        yield


CHOICES: dict[str, Callable[[Any], Any]] = {
    "use_adapter": lambda model: hf_lora.use_adapter(model, "b"),
    "several": lambda model: hf_lora.use_adapter(model, ["b", "a"]),
    "weights": lambda model: hf_lora.use_adapter(model, {"a": 0.3, "b": -0.7}),
    "no_adapter": hf_lora.no_adapter,
    "activate": by_activate,
    "autocast": under_autocast,
}


def gradients(model: Any, choose: Callable[[Any], Any], x: torch.Tensor, run: Any = None) -> Any:
    """Return the gradients of a forward inside of a choice and a backward outside, twice."""
    embedded = model.get_input_embeddings()(x).detach().requires_grad_()
    for _ in range(2):  # layers that read one tensor are known from the second on
        model.zero_grad()
        embedded.grad = None
        with choose(model):
            loss = model(inputs_embeds=embedded, labels=x).loss
        (run or torch.Tensor.backward)(loss)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"inputs": embedded.grad.clone()}


def several(x: torch.Tensor) -> list[torch.Tensor]:
    """Return other rows of the same size, since the rounding of one alone is half chance."""
    return [x, x.flip(-1), x.roll(1, -1), x.roll(2, -1)]


@pytest.mark.parametrize("few", [True, False], ids=["few rows", "many rows"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("choice", CHOICES)
def test_the_gradients_are_those_without_checkpointing(choice: str, how: bool, few: bool):
    choose, trials = CHOICES[choice], []
    for x in several(tokens(few)):
        wanted = gradients(llama(None), choose, x)
        assert any(name.endswith("_b") for name in wanted) == (choice != "no_adapter")
        exact = gradients(llama(None).double(), choose, x)  # autocast leaves float64 alone
        trials.append((gradients(llama(how), choose, x), wanted, exact))
    assert_rounded_alike(*trials)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_a_backward_pass_in_another_thread_and_another_choice(how: bool):
    """As that of a GPU is, whose threads have no context of the caller's."""

    def elsewhere(loss: torch.Tensor) -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    choose, trials = CHOICES["use_adapter"], []
    for x in several(tokens(few=True)):
        wanted = gradients(llama(None), choose, x)
        exact = gradients(llama(None).double(), choose, x)
        trials.append((gradients(llama(how), choose, x, elsewhere), wanted, exact))
    assert_rounded_alike(*trials)
    again = []
    for x, (_, wanted, exact) in zip(several(tokens(few=True)), trials, strict=True):
        model = llama(how)

        def inside_another(loss: torch.Tensor, model: Any = model) -> None:
            with hf_lora.no_adapter(model):
                loss.backward()
                assert hf_lora.active_adapters(model) == ()

        again.append((gradients(model, choose, x, inside_another), wanted, exact))
    assert_rounded_alike(*again)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_dropout_and_modules_in_full_are_part_of_it(how: bool):
    def build(way: bool | None) -> Any:
        return llama(way, dropout=0.3, train=["layers.1.input_layernorm", "norm"])

    def seeded(model: Any) -> Any:
        torch.manual_seed(7)
        return hf_lora.use_adapter(model, {"a": 0.5, "b": 1.0})

    x = tokens(few=False)
    wanted, exact = (gradients(made, seeded, x) for made in (build(None), build(None).double()))
    assert_rounded_alike((gradients(build(how), seeded, x), wanted, exact))


def two_losses(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the sum of two forwards under different adapters, as of a teacher and a student."""
    with hf_lora.use_adapter(model, "b"):
        one = model(input_ids=x, labels=x).loss
    return one + 2 * model(input_ids=x, labels=x).loss


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_two_forwards_in_one_backward_pass_keep_apart(how: bool):
    x, found = tokens(few=False), []
    for model in (llama(how), llama(None), llama(None).double()):
        two_losses(model, x).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert {name.rpartition("_")[2] for name in found[0]} >= {"a", "b"}
    assert_rounded_alike((found[0], found[1], found[2]))


def net() -> Net:
    torch.manual_seed(0)
    model = hf_lora.wrap(Net(), ["q_proj", "v_proj"], adapter="a", r=2)
    hf_lora.add_adapter(model, "b", ["q_proj", "v_proj"], r=2)
    scramble(model)
    return model


def nested(model: Net, x: torch.Tensor) -> torch.Tensor:
    def inner(x: torch.Tensor) -> torch.Tensor:
        with hf_lora.use_adapter(model, "a"):  # chosen by the function itself, and so again
            x = checkpoint(model.layers[0], x, use_reentrant=False)
        return checkpoint(model.layers[1], x, use_reentrant=False)

    return model.head(checkpoint(inner, x, use_reentrant=False))


def plainly(model: Net, x: torch.Tensor) -> torch.Tensor:
    with hf_lora.use_adapter(model, "a"):
        x = model.layers[0](x)
    return model.head(model.layers[1](x))


def wrapped_blocks(model: Net, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        x = checkpoint_wrapper(layer)(x)
    return model.head(x)


def in_place(model: Net, x: torch.Tensor) -> torch.Tensor:
    for layer in model.layers:
        checkpoint_in_place(layer)
    return model(x)


def in_segments(model: Net, x: torch.Tensor) -> torch.Tensor:
    return model.head(checkpoint_sequential(list(model.layers), 2, x, use_reentrant=True))


def twice(model: Net, x: torch.Tensor) -> torch.Tensor:
    y = checkpoint(model, x, use_reentrant=False)
    y.sum().backward(retain_graph=True)
    model.zero_grad()
    return y


@pytest.mark.parametrize(
    ("way", "oracle"),
    [
        (nested, plainly),
        (wrapped_blocks, Net.__call__),
        (in_place, Net.__call__),
        (in_segments, Net.__call__),
        (twice, Net.__call__),
    ],
)
def test_every_way_to_checkpoint(way: Callable, oracle: Callable):
    found = []
    for run, dtype in ((way, torch.float32), (oracle, torch.float32), (oracle, torch.float64)):
        model, x = net().to(dtype), rows().to(dtype).requires_grad_()
        with hf_lora.use_adapter(model, "b"):
            y = run(model, x)
        y.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any(name.endswith("_b") for name in found[0])
    assert_rounded_alike((found[0], found[1], found[2]))


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (lambda model: hf_lora.merge(model, "b"), "merged or unmerged"),
        (lambda model: hf_lora.delete_adapter(model, "b"), "b deleted"),
    ],
    ids=["merge", "delete"],
)
def test_what_cannot_be_done_again_is_refused(verb: Callable, words: str, how: bool):
    model, x = net(), rows().requires_grad_()
    with hf_lora.use_adapter(model, "b"):
        y = checkpoint(model, x, use_reentrant=how)
    verb(model)
    with pytest.raises(StateError, match=words):
        y.sum().backward()
    assert hf_lora.active_adapters(model) == ("a",)


def test_an_unmerge_in_between_is_refused_too():
    model, x = net(), rows().requires_grad_()
    hf_lora.merge(model)
    y = checkpoint(model, x, use_reentrant=False)
    hf_lora.unmerge(model)
    with pytest.raises(StateError, match="Call backward"):
        y.sum().backward()


def test_models_without_adapters_are_checkpointed_as_ever():
    plain = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ZeroDivisionError):
        checkpoint(lambda x: x / 0 if plain(x) is None else 1 / 0, rows(), use_reentrant=False)
    y = checkpoint(plain, rows().requires_grad_(), use_reentrant=True)
    y.sum().backward()
    assert plain.weight.grad is not None


def test_the_parts_of_pytorch_are_changed_once():
    forward = torch.utils.checkpoint.CheckpointFunction.forward
    hook = torch.utils.checkpoint._checkpoint_hook
    keep_functions(lambda function: function)
    net()
    assert torch.utils.checkpoint.CheckpointFunction.forward is forward
    assert torch.utils.checkpoint._checkpoint_hook is hook
    assert hook.__mro__[1].__name__ == "_checkpoint_hook"


def test_deepspeeds_own_two_ways_to_checkpoint():
    """In a process of its own, because DeepSpeed changes the one that imports it."""
    ran = forked.run("tests.distributed.checkpointing_worker:main")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("the same\n")
