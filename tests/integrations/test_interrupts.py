"""Ctrl-C at any line of any verb: the model is as before or as after, and the same call works.

A trace function raises at the n-th line that runs inside hf_lora. Each verb is interrupted at lines
spread over all of them here, and at every one of them in the slow ring.
"""

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.adapter_io.restore import restore_checkpoint
from hf_lora.model.registry import find, registry_of
from hf_lora.model.unfrozen import adopt_unfrozen
from tests.integrations import training
from tests.snapshot import Snapshot, snapshot

PACKAGE = os.path.dirname(hf_lora.__file__)
IDS = torch.tensor([training.tokens(2)[0]["input_ids"]])
PLACES = 12
"""At how many lines a verb is interrupted outside of the slow ring."""


@contextlib.contextmanager
def interrupt(*numbers: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the lines of hf_lora with these numbers; hand out the count."""
    seen = [0]

    def local(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            seen[0] += 1
            if seen[0] in numbers:
                raise KeyboardInterrupt(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        yield seen
    finally:
        sys.settrace(before)


def base() -> Any:
    """A model with a buffer that something may move."""
    model = training.llama(num_hidden_layers=1, tie_word_embeddings=True).eval()
    model.model.layers[0].mlp.register_buffer("seen", torch.zeros(3))
    return model


def wrapped(**fields: Any) -> Any:
    return hf_lora.wrap(base(), ["q_proj"], r=2, **fields)


def stirred(model: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad or "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def two() -> Any:
    return stirred(hf_lora.add_adapter(wrapped(train=["norm"]), "b", ["v_proj"], r=2))


def merged() -> Any:
    return hf_lora.merge(stirred(wrapped(train=["lm_head"])))


def unfrozen() -> Any:
    """A model with a part of its base unfrozen by hand."""
    model = two()
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    return model


def adopted() -> Any:
    """The same, trained since the adapter holds that part."""
    model = unfrozen()
    norm = model.model.layers[0].input_layernorm.weight
    adopt_unfrozen(model, registry_of(model))
    norm.data += 0.5
    return model


def moved(model: Any = None, step: float = 1.0) -> Any:
    """A model of which a training has just moved a buffer, and nobody has looked since."""
    model = two() if model is None else model
    registry_of(model).buffers.begin(model, registry_of(model))
    model.model.layers[0].mlp.seen.add_(step)
    return model


def offloaded() -> Any:
    """A model whose weights accelerate fetches for each call."""
    return stirred(hf_lora.wrap(accelerate.cpu_offload(base()), ["q_proj"], r=2))


class Verb:
    """A verb, the model that it is called on, and what that does."""

    def __init__(self, make: Callable[[], Any], call: Callable[[Any, Path], Any]):
        self.make, self.call = make, call


def saved(folder: Path) -> Path:
    """An adapter on disk, the same whoever asks."""
    if not (folder / "on-disk").exists():
        hf_lora.save(stirred(wrapped(train=["norm"])), folder / "on-disk")
    return folder / "on-disk"


def saved_moved(folder: Path) -> Path:
    """The same, with a buffer that moved."""
    if not (folder / "moved-on-disk").exists():
        model = moved(stirred(wrapped(train=["norm"])), 2.0)
        hf_lora.save(model, folder / "moved-on-disk")
    return folder / "moved-on-disk"


VERBS = {
    "wrap": Verb(base, lambda m, _: hf_lora.wrap(m, ["q_proj"], r=2, train=["norm"])),
    "load": Verb(base, lambda m, folder: hf_lora.load(m, saved(folder), trainable=True)),
    "load another": Verb(two, lambda m, folder: hf_lora.load(m, saved(folder), adapter="c")),
    "load_adapter": Verb(wrapped, lambda m, folder: m.load_adapter(saved(folder), "c")),
    "load in its place": Verb(
        two, lambda m, folder: hf_lora.load(m, saved(folder), replace=True, trainable=True)
    ),
    "load another in its place": Verb(
        two, lambda m, folder: hf_lora.load(m, saved(folder), adapter="b", replace=True)
    ),
    "restore": Verb(
        lambda: stirred(wrapped(train=["norm"])),
        lambda m, folder: restore_checkpoint(m, saved(folder)),
    ),
    "add_adapter": Verb(two, lambda m, _: hf_lora.add_adapter(m, "c", ["q_proj"], r=3)),
    "add_adapter of its own": Verb(
        two, lambda m, _: m.add_adapter(hf_lora.LoRAConfig(targets=["q_proj"], r=3), "c")
    ),
    "delete_adapter": Verb(two, lambda m, _: hf_lora.delete_adapter(m, "b")),
    "delete the active one": Verb(two, lambda m, _: hf_lora.delete_adapter(m, "default")),
    "activate": Verb(two, lambda m, _: hf_lora.activate(m, ["b", "default"])),
    "freeze": Verb(two, lambda m, _: hf_lora.freeze(m, ["default", "b"])),
    "unfreeze": Verb(
        lambda: hf_lora.freeze(two(), ["default", "b"]),
        lambda m, _: hf_lora.unfreeze(m, ["b", "default"]),
    ),
    "merge": Verb(two, lambda m, _: hf_lora.merge(m)),
    "merge a tied head": Verb(
        lambda: stirred(wrapped(train=["lm_head"])), lambda m, _: hf_lora.merge(m)
    ),
    "unmerge": Verb(merged, lambda m, _: hf_lora.unmerge(m)),
    "unwrap": Verb(two, lambda m, _: hf_lora.unwrap(m)),
    "unwrap a merged one": Verb(merged, lambda m, _: hf_lora.unwrap(m)),
    "merge_and_unwrap": Verb(two, lambda m, _: hf_lora.merge_and_unwrap(m)),
    "merge_and_unwrap a merged one": Verb(merged, lambda m, _: hf_lora.merge_and_unwrap(m)),
    "merge_and_unwrap an offloaded one": Verb(offloaded, lambda m, _: hf_lora.merge_and_unwrap(m)),
    "save": Verb(two, lambda m, folder: hf_lora.save(m, folder / "saved")),
    "save what was unfrozen": Verb(unfrozen, lambda m, folder: hf_lora.save(m, folder / "saved")),
    "unwrap what was unfrozen": Verb(adopted, lambda m, _: hf_lora.unwrap(m)),
    "delete what was unfrozen": Verb(adopted, lambda m, _: hf_lora.delete_adapter(m, "default")),
    "activate another after a buffer moved": Verb(moved, lambda m, _: hf_lora.activate(m, "b")),
    "delete what moved": Verb(moved, lambda m, _: hf_lora.delete_adapter(m, "default")),
    "unwrap what moved": Verb(moved, lambda m, _: hf_lora.unwrap(m)),
    "merge what moved": Verb(moved, lambda m, _: hf_lora.merge(m)),
    "merge_and_unwrap what moved": Verb(moved, lambda m, _: hf_lora.merge_and_unwrap(m)),
    "load what moved": Verb(base, lambda m, folder: hf_lora.load(m, saved_moved(folder))),
    "load what moved in its place": Verb(
        two, lambda m, folder: hf_lora.load(m, saved_moved(folder), replace=True, trainable=True)
    ),
    "restore what moved": Verb(
        lambda: moved(stirred(wrapped(train=["norm"]))),
        lambda m, folder: restore_checkpoint(m, saved_moved(folder)),
    ),
    "restore what has not moved": Verb(
        lambda: moved(stirred(wrapped(train=["norm"]))),
        lambda m, folder: restore_checkpoint(m, saved(folder)),
    ),
}


@torch.no_grad()
def said(model: Any) -> tuple[Any, ...]:
    """What can be seen of a model: its answer, names, classes, flags, choice and configuration."""
    found = find(model)
    if found is not None:
        found[1].settle_buffers()  # what has moved is the adapter's as soon as somebody looks
    return (
        model(IDS).logits,
        model.model.layers[0].mlp.seen.tolist(),
        model.model.layers[0].mlp._buffers["seen"].tolist(),
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        list(model.state_dict()),
        model.config.tie_word_embeddings,
        sorted(k for k in vars(model) if not k.startswith("__")),
        None
        if found is None
        else (
            [*found[1].adapters],
            found[1].routing.active,
            found[1].routing.merged,
            [*found[1].modules],
            [*found[1].exclusive],
            len(found[1].originals),
        ),
    )


def alike(a: tuple, b: tuple) -> bool:
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


def lines(verb: Verb, folder: Path) -> int:
    """How many lines of hf_lora a call runs."""
    model = verb.make()
    with interrupt() as seen:
        verb.call(model, folder)
    return seen[0]


def seeded_call(verb: Verb, model: Any, folder: Path) -> None:
    with training.seeded(4):
        verb.call(model, folder)


def check(verb: Verb, folder: Path, numbers: list[int], *more: int) -> None:
    """Interrupt a verb at each of these lines, and perhaps its undoing some lines later."""
    start = verb.make()
    before, base_before = said(start), snapshot(base())
    seeded_call(verb, start, folder)
    after = said(start)
    assert "_hf_lora_journal" not in vars(start)
    for number in numbers:
        model = verb.make()
        place = "no line"
        with interrupt(number, *(number + distance for distance in more)):
            try:
                seeded_call(verb, model, folder)
            except KeyboardInterrupt as error:
                place = f"{error}"
        if not more:
            now = said(model)
            assert alike(now, before) or alike(now, after), f"line {number}, {place}: neither"
            if alike(now, after) and not alike(before, after):
                continue
        with contextlib.suppress(hf_lora.StateError):  # it is done already
            seeded_call(verb, model, folder)
        assert alike(said(model), after), f"line {number}, {place}: the same call does not work"
        with contextlib.suppress(hf_lora.StateError):
            hf_lora.unwrap(model)
        if "merge_and_unwrap" not in where(verb):
            assert_base(model, base_before, f"line {number}, {place}")


def where(verb: Verb) -> str:
    return next(name for name, one in VERBS.items() if one is verb)


def assert_base(model: nn.Module, want: Snapshot, place: str) -> None:
    now = snapshot(model)
    assert [m[2:] for m in now.modules] == [m[2:] for m in want.modules], place
    assert [p[2:] for p in now.parameters] == [p[2:] for p in want.parameters], place
    assert now.keys == want.keys, place


def sample(verb: Verb, folder: Path, count: int) -> list[int]:
    """Lines spread over the call, others each time the code changes, and the last ones."""
    total = lines(verb, folder)
    step = max(total // count, 1)
    chance = random.Random(total)
    spread = [at + chance.randrange(step) for at in range(1, total + 1, step)]
    return sorted({*spread, *range(max(1, total - 12), total + 1)})


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_interrupted_at_a_sample_of_its_lines(tmp_path: Path, name: str):
    verb = VERBS[name]
    saved(tmp_path)
    saved_moved(tmp_path)
    check(verb, tmp_path, sample(verb, tmp_path, PLACES))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", VERBS)
def test_a_verb_interrupted_at_every_line(tmp_path: Path, name: str):
    verb = VERBS[name]
    saved(tmp_path)
    saved_moved(tmp_path)
    check(verb, tmp_path, list(range(1, lines(verb, tmp_path) + 1)))


@pytest.mark.parametrize("name", ["wrap", "load another", "delete_adapter", "merge", "unwrap"])
def test_the_undoing_interrupted_as_well_is_gone_on_with_by_the_next_call(
    tmp_path: Path, name: str
):
    verb = VERBS[name]
    saved(tmp_path)
    saved_moved(tmp_path)
    total = lines(verb, tmp_path)
    numbers = random.Random(3).sample(range(total // 2, total), 12)
    for distance in (1, 3, 8, 20):
        check(verb, tmp_path, numbers[distance % 3 :: 3], distance)


def test_an_error_of_somebody_elses_hook_leaves_the_model_as_it_was():
    """What a library does when a parameter is registered may fail, like anything from outside."""
    model = base()
    before = snapshot(model)
    calls = []

    def refuse(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        calls.append(name)
        if len(calls) == 2:
            raise RuntimeError("no more memory")

    handle = nn.modules.module.register_module_parameter_registration_hook(refuse)
    try:
        with pytest.raises(RuntimeError, match="no more memory"):
            hf_lora.wrap(model, ["q_proj", "v_proj"], r=2)
    finally:
        handle.remove()
    assert snapshot(model) == before
    hf_lora.wrap(model, ["q_proj", "v_proj"], r=2)


def test_a_choice_made_in_a_block_survives_an_interrupted_delete():
    model = two()
    total = lines(VERBS["delete_adapter"], Path())
    with hf_lora.use_adapter(model, ["b"]):
        want = said(model)
        for number in range(total // 2, total, 5):
            with contextlib.suppress(KeyboardInterrupt), interrupt(number):
                hf_lora.delete_adapter(model, "b")
            if "b" not in hf_lora.adapters(model):
                break
            assert alike(said(model), want)
