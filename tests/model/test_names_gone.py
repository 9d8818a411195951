"""A deleted adapter leaves nothing: a model is as it was, whatever names it has had."""

import copy
import gc
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lora
from tests.integrations import training
from tests.tiny import Net, adapted, answers, saved

MANY = 50


def strings(root: Any, wanted: str) -> list[str]:
    """Return every string reachable from an object that contains another."""
    found, seen, left = [], set(), [root]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, type | torch.Tensor):
            continue
        seen.add(id(each))
        if isinstance(each, str) and wanted in each:
            found.append(each)
        if isinstance(each, dict):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            left += each
        left += vars(each).values() if hasattr(each, "__dict__") else ()
    return found


def cycle(model: Net, folder: Path, name: str) -> None:
    """Load, use, weigh, merge, copy and delete an adapter."""
    hf_lora.load(model, folder, adapter=name)
    with hf_lora.use_adapter(model, {name: 0.5}):
        answers(model)
    hf_lora.activate(model, [name, "default"])
    hf_lora.merge(model, name)
    hf_lora.unmerge(model)
    hf_lora.activate(model, "default")
    hf_lora.freeze(model, name)
    hf_lora.delete_adapter(model, name)


@pytest.mark.parametrize("train", [(), ("head",)], ids=["low-rank", "head in full"])
def test_nothing_with_its_name_is_reachable_afterwards(tmp_path: Path, train: tuple[str, ...]):
    model = adapted()
    saved(tmp_path, train=train)
    cycle(model, tmp_path, "zebra")
    assert strings(model, "zebra") == []
    assert strings(model, "default")  # what is there is seen
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert strings(twin, "zebra") == []
    assert b"zebra" not in pickle.dumps(model)


def test_an_adapter_deleted_while_disabled_leaves_nothing():
    model = hf_lora.wrap(training.llama(), "q_proj", r=2)
    hf_lora.add_adapter(model, "zebra", "q_proj", r=1)
    model.set_adapter({"zebra": 0.5, "default": 1.0})
    model.disable_adapters()
    model.delete_adapter("zebra")
    assert strings(model, "zebra") == []
    model.enable_adapters()
    assert model.active_adapters() == ["default"]


def test_what_a_model_holds_does_not_grow_with_the_names_it_has_had(tmp_path: Path):
    model = adapted()
    saved(tmp_path)
    held, sizes = [], set()
    tracemalloc.start()
    for number in range(3 * MANY):
        if number % MANY == 0:  # the first time also fills Python's own free lists
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
            sizes.add(len(pickle.dumps(model)))
        cycle(model, tmp_path, f"user{number}")
    tracemalloc.stop()
    assert len(sizes) == 1
    # an adapter takes 10 kB here; Python's own cache of attribute names goes on filling for a while
    assert held[2] - held[1] < 1000 * MANY
