"""Threads and tasks that use different adapters of one model at the same time."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import StateError
from hf_lora.model.registry import registry_of
from tests.tiny import Net, answers, rows, scramble


def two() -> tuple[Net, dict[str, torch.Tensor]]:
    """Return a model with two adapters, "a" in use, and what each answers alone."""
    model = hf_lora.wrap(Net(), ["q_proj"], adapter="a", r=2)
    hf_lora.add_adapter(model, "b", ["q_proj", "v_proj"], r=2)
    scramble(model)
    wanted = {}
    for name in ("b", "a"):
        wanted[name] = answers(hf_lora.activate(model, name))
    return model.eval(), wanted


def in_thread(function: Callable[[], Any]) -> Any:
    """Return what a function returns in a new thread, or raise what it raises there."""
    found: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


def test_blocks_that_are_open_at_once_in_two_threads_do_not_meet():
    model, wanted = two()
    together = threading.Barrier(2, timeout=60)
    wrong: list[str] = []

    def serve(name: str) -> None:
        for _ in range(5):
            with hf_lora.use_adapter(model, name):
                together.wait()
                same = [torch.equal(answers(model), wanted[name]) for _ in range(3)]
                wrong.extend([name] * same.count(False))
                together.wait()

    threads = [threading.Thread(target=serve, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_activate_sets_all_threads_see_that_are_in_no_block():
    model, wanted = two()
    with hf_lora.use_adapter(model, "a"):
        in_thread(lambda: hf_lora.activate(model, "b"))
        assert in_thread(lambda: hf_lora.active_adapters(model)) == ("b",)
        assert torch.equal(in_thread(lambda: answers(model)), wanted["b"])
        assert torch.equal(answers(model), wanted["a"])
    assert torch.equal(answers(model), wanted["b"])


def test_a_thread_started_in_a_block_begins_anew_unless_it_is_given_the_context():
    model, wanted = two()
    with hf_lora.use_adapter(model, "b"):
        assert torch.equal(in_thread(lambda: answers(model)), wanted["a"])
        context = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: context.run(answers, model)), wanted["b"])
    # the copy keeps the context that it is a copy of, but not a block that was left
    assert torch.equal(in_thread(lambda: context.run(answers, model)), wanted["a"])


def test_tasks_that_take_turns_have_each_its_own():
    model, wanted = two()

    async def serve(name: str) -> list[bool]:
        found = []
        with hf_lora.use_adapter(model, name):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(torch.equal(answers(model), wanted[name]))
                found.append(torch.equal(await asyncio.to_thread(answers, model), wanted[name]))
        return found

    async def main() -> list[list[bool]]:
        return await asyncio.gather(*(serve(name) for name in "abab"))

    assert all(all(found) for found in asyncio.run(main()))
    assert hf_lora.active_adapters(model) == ("a",)


def test_one_block_object_may_be_entered_by_several_threads():
    model, wanted = two()
    block = hf_lora.use_adapter(model, "b")
    with block:
        with pytest.raises(ZeroDivisionError):
            in_thread(lambda: _fail_inside(block))
        assert torch.equal(answers(model), wanted["b"])
    assert torch.equal(answers(model), wanted["a"])


def _fail_inside(block: Any) -> None:
    with block:
        raise ZeroDivisionError


def test_a_block_that_another_thread_closes_is_closed():
    model, wanted = two()

    def stream() -> Iterator[tuple[str, ...]]:
        with hf_lora.use_adapter(model, "b"):
            yield hf_lora.active_adapters(model)

    streaming = stream()
    assert next(streaming) == ("b",)
    in_thread(streaming.close)
    assert torch.equal(answers(model), wanted["a"])
    with hf_lora.no_adapter(model):
        assert hf_lora.active_adapters(model) == ()
    assert hf_lora.active_adapters(model) == ("a",)


def test_models_do_not_see_each_others_blocks():
    (one, wanted), (other, _) = two(), two()
    with hf_lora.use_adapter(one, "b"), hf_lora.no_adapter(other):
        assert torch.equal(answers(one), wanted["b"])
        hf_lora.activate(other, "b")  # inside other's block, and it ends with it
        assert torch.equal(answers(other), wanted["b"])
    assert hf_lora.active_adapters(other) == ("a",)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_a_block_is_outside_of_it(twin: Callable[[Net], Net]):
    model, wanted = two()
    with hf_lora.use_adapter(model, "b"):
        made = twin(model)
        assert torch.equal(answers(made), wanted["a"])
        with hf_lora.no_adapter(made):
            assert torch.equal(answers(model), wanted["b"])
        assert torch.equal(answers(made), wanted["a"])


@pytest.mark.parametrize("names", ["b", ["a", "b"], []], ids=str)
def test_what_another_thread_uses_is_neither_deleted_nor_merged(names: Any):
    model, _ = two()
    hf_lora.add_adapter(model, "c", "q_proj", r=1)
    inside, go = threading.Event(), threading.Event()
    found: list[torch.Tensor] = []

    def serve() -> None:
        with hf_lora.use_adapter(model, names):
            found.append(answers(model))
            inside.set()
            go.wait(60)
            found.append(answers(model))

    thread = threading.Thread(target=serve)
    thread.start()
    inside.wait(60)
    if names:
        with pytest.raises(StateError, match="Another thread or task uses b"):
            hf_lora.delete_adapter(model, "b")
    with pytest.raises(StateError, match="Another thread or task is in a use_adapter"):
        hf_lora.merge(model)
    hf_lora.delete_adapter(model, "c")
    go.set()
    thread.join()
    assert torch.equal(*found)
    hf_lora.activate(model, "a")
    hf_lora.delete_adapter(model, "b")
    hf_lora.merge(model)


def test_replicas_of_data_parallel_run_in_threads_and_use_what_the_caller_uses():
    model, _ = two()
    with hf_lora.use_adapter(model, "b"):
        layer = model.layers[0].q_proj
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer._parameters.items():  # as torch.nn.parallel.replicate does
            setattr(replica, name, parameter)
        expected = layer(rows())
        assert torch.equal(in_thread(lambda: replica(rows())), expected)
        assert not torch.equal(in_thread(lambda: layer(rows())), expected)
    assert layer._replicate_for_data_parallel().lora_routing is layer.lora_routing


def test_nothing_of_a_block_that_was_left_stays():
    model, _ = two()
    routing = registry_of(model).routing
    stack = list(contextvars.copy_context().items())
    for _ in range(3):
        with hf_lora.use_adapter(model, "b"), hf_lora.no_adapter(model):
            assert len(routing.blocks) == 2
    gc.collect()
    assert not len(routing.blocks)
    assert list(contextvars.copy_context().items()) == stack


def test_a_layer_of_ones_own_needs_no_model():
    layer = hf_lora.LoRALinear(nn.Linear(8, 8), r=2)
    nn.init.normal_(layer.lora_B)
    expected = layer(rows())
    assert torch.equal(in_thread(lambda: layer(rows())), expected)
