"""What grows with the number of layers: nothing faster than they do, and a switch not at all.

Operations are counted, not seconds: a clock on a shared machine measures the machine.
"""

import contextlib
import cProfile
import gc
from collections.abc import Callable

import pytest
from torch import nn

import hf_lora
from hf_lora.kinds.lora import LoRALayer
from hf_lora.model.registry import Registry, registry_of
from tests.snapshot import low_rank

SMALL, LARGE = 30, 240


def stack(layers: int) -> nn.Module:
    """Return as many layers as asked for, four in a block."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    blocks = (nn.ModuleDict({n: nn.Linear(2, 2) for n in names}) for _ in range(layers // 4))
    return nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def added(layers: int, adapters: int) -> nn.Module:
    """Return such a stack with as many adapters as asked for."""
    model = hf_lora.wrap(stack(layers), r=1)
    for index in range(1, adapters):
        hf_lora.add_adapter(model, f"a{index}", ".*_proj", r=1)
    return model


Verb = Callable[[nn.Module], object]


def calls(verb: Verb, model: nn.Module) -> int:
    """Return how many function calls a verb takes, Python's and C's."""
    profile = cProfile.Profile()
    gc.collect()
    gc.disable()  # what is collected in between calls what it was waiting for
    try:
        profile.enable()
        verb(model)
        profile.disable()
    finally:
        gc.enable()
    return sum(entry.callcount for entry in profile.getstats())


FOUR = ["q_proj", r"layers\..*k_proj", "v_proj", "o_proj"]
WORK: dict[str, tuple[int, Verb]] = {
    "plan": (0, lambda m: hf_lora.plan(m, r=1)),
    "plan of patterns": (0, lambda m: hf_lora.plan(m, FOUR, r=1)),
    "plan with train": (0, lambda m: hf_lora.plan(m, "q_proj", r=1, train=["[kvo]_proj"])),
    "plan without a match": (0, lambda m: hf_lora.plan(m, "nothing")),
    "wrap": (0, lambda m: hf_lora.wrap(m, r=1)),
    "wrap with train": (0, lambda m: hf_lora.wrap(m, "q_proj", r=1, train=["[kvo]_proj"])),
    "second adapter": (1, lambda m: hf_lora.add_adapter(m, "z", ".*_proj", r=1)),
    "third adapter": (2, lambda m: hf_lora.add_adapter(m, "z", ".*_proj", r=1)),
    "delete": (3, lambda m: hf_lora.delete_adapter(m, "a1")),
    "merge and unmerge": (2, lambda m: hf_lora.unmerge(hf_lora.merge(m))),
    "summary": (2, hf_lora.summary),
    "freeze": (2, lambda m: hf_lora.freeze(m, "a1")),
    "unwrap": (3, hf_lora.unwrap),
}


@pytest.mark.parametrize(("adapters", "verb"), WORK.values(), ids=WORK.keys())
def test_work_grows_no_faster_than_the_layers(adapters: int, verb: Verb):
    def count(layers: int) -> int:
        return calls(verb, added(layers, adapters) if adapters else stack(layers))

    count(SMALL)  # whatever is looked up once only
    assert count(LARGE) <= 1.1 * count(SMALL) * LARGE / SMALL


def test_a_later_adapter_costs_what_an_earlier_one_does():
    adapters, verb = WORK["second adapter"]
    second, sixth = (calls(verb, added(LARGE, n)) for n in (adapters, 5))
    assert sixth < 1.4 * second


def within(block: contextlib.AbstractContextManager) -> None:
    with block:
        pass


SWITCHES: dict[str, Verb] = {
    "activate": lambda m: hf_lora.activate(m, "a1"),
    "activate several": lambda m: hf_lora.activate(m, ["default", "a1"]),
    "use_adapter": lambda m: within(hf_lora.use_adapter(m, "a1")),
    "no_adapter": lambda m: within(hf_lora.no_adapter(m)),
    "active_adapters": hf_lora.active_adapters,
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES.keys())
def test_a_switch_takes_the_same_few_calls_on_any_model(switch: Verb):
    # the first time something is looked up once for all
    _, few, many = (calls(switch, added(n, 2)) for n in (SMALL, SMALL, LARGE))
    assert few == many < 150


def test_a_switch_touches_no_module(monkeypatch: pytest.MonkeyPatch):
    model = added(SMALL, 2)
    registry = registry_of(model)

    def touched(self: object, *args: object) -> object:
        raise AssertionError(f"{type(self).__name__} was touched: {args}")

    before = [dict(vars(layer)) for layer in low_rank(registry).values()]
    monkeypatch.setattr(nn.Module, "__setattr__", touched)
    monkeypatch.setattr(nn.Module, "__getattr__", touched)
    monkeypatch.setattr(nn.Module, "named_modules", touched)
    monkeypatch.setattr(LoRALayer, "lora_pair", touched)
    monkeypatch.setattr(Registry, "tensors", touched)
    hf_lora.activate(model, ["default", "a1"])
    with hf_lora.no_adapter(model), hf_lora.use_adapter(model, "a1"):
        assert hf_lora.active_adapters(model) == ("a1",)
    assert hf_lora.active_adapters(model) == ("default", "a1")
    monkeypatch.undo()
    assert [dict(vars(layer)) for layer in low_rank(registry).values()] == before
