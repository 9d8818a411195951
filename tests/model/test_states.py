"""Which adapters are active, trained, merged: three things, and none moves another."""

import itertools

import pytest
import torch
from torch import nn

import hf_lora
from hf_lora import HfLoRAWarning, StateError
from hf_lora.model.registry import registry_of
from tests.tiny import Net, answers, scramble

NAMES = ("a", "b")


def build(active: tuple[str, ...], frozen: tuple[str, ...], merged: tuple[str, ...]) -> Net:
    """Return a model with two adapters in these states."""
    model = Net()
    hf_lora.wrap(model, "q_proj", r=2, adapter="a", train=["head"])
    hf_lora.add_adapter(model, "b", ["q_proj", "v_proj"], r=3)
    scramble(model)
    hf_lora.activate(model, active)
    hf_lora.freeze(model, frozen)
    if merged:
        hf_lora.merge(model, merged)
    return model


def states(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return what is active, frozen and merged, read off the model itself."""
    registry = registry_of(model)
    trains = {
        name: {p.requires_grad for _, p in registry.parameters(name)} for name in registry.adapters
    }
    assert all(len(flags) == 1 for flags in trains.values())
    frozen = tuple(name for name, flags in trains.items() if flags == {False})
    return registry.routing.active, frozen, registry.routing.merged


SUBSETS = [(), ("a",), ("b",), ("a", "b")]
TABLE = list(itertools.product(SUBSETS, SUBSETS, SUBSETS))


@pytest.mark.parametrize(("active", "frozen", "merged"), TABLE)
def test_each_verb_moves_its_own_state_and_no_other(
    active: tuple[str, ...], frozen: tuple[str, ...], merged: tuple[str, ...]
):
    """All 64 combinations of what two adapters can be."""
    model = build(active, frozen, merged)
    assert states(model) == (active, frozen, merged)

    for name in NAMES:  # the training flag
        hf_lora.freeze(model, name)
        assert states(model) == (active, tuple(n for n in NAMES if n in {*frozen, name}), merged)
        hf_lora.unfreeze(model, name)
        assert states(model) == (active, tuple(n for n in frozen if n != name), merged)
        if name in frozen:
            hf_lora.freeze(model, name)
        assert states(model) == (active, frozen, merged)

    for choice in SUBSETS:  # which are active; what is in the weights cannot be out of use
        if not set(merged) <= set(choice):
            with pytest.raises(StateError, match="merged into the weights"):
                hf_lora.activate(model, choice)
            with pytest.raises(StateError, match="merged into the weights"):
                hf_lora.use_adapter(model, choice)
            assert states(model) == (active, frozen, merged)
            continue
        with hf_lora.use_adapter(model, choice):
            assert states(model) == (choice, frozen, merged)
        assert states(model) == (active, frozen, merged)
        hf_lora.activate(model, choice)
        assert states(model) == (choice, frozen, merged)
        if set(merged) <= set(active):
            hf_lora.activate(model, active)
        else:  # as it was before the merge, which did not ask
            registry_of(model).routing.choose(tuple((name, 1.0) for name in active))

    for choice in SUBSETS:  # what is merged, on top of what is already
        if not choice or set(choice) & set(merged):
            with pytest.raises(StateError):
                hf_lora.merge(model, choice)
        else:
            hf_lora.merge(model, choice)
            assert states(model) == (active, frozen, (*merged, *choice))
            hf_lora.unmerge(model)
            if merged:
                hf_lora.merge(model, merged)
        assert states(model) == (active, frozen, merged)

    hf_lora.add_adapter(model, "c", "q_proj", r=1)
    hf_lora.delete_adapter(model, "c")
    for name in merged:
        with pytest.raises(StateError, match="delete an adapter while"):
            hf_lora.delete_adapter(model, name)
    assert states(model) == (active, frozen, merged)


@pytest.mark.parametrize(("active", "merged"), list(itertools.product(SUBSETS, SUBSETS)))
def test_what_counts_is_active_or_merged_once(active: tuple[str, ...], merged: tuple[str, ...]):
    model = build(active, (), merged)
    both = tuple(name for name in NAMES if name in {*active, *merged})
    expected = answers(build(both, (), ()))
    assert torch.allclose(answers(model), expected, atol=1e-5)


def test_an_adapter_trains_by_its_flag_not_by_being_active():
    model = build(("a",), ("a",), ())
    parameters = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(torch.randn(3, 8)).sum().backward()
    hf_lora.activate(model, ["a", "b"])
    model(torch.randn(3, 8)).sum().backward()
    graded = {name for name, p in parameters.items() if p.grad is not None}
    assert graded
    assert all(name.endswith("_b") for name in graded)


def test_blocks_nest_and_restore_also_after_an_error():
    model = build(("a",), (), ())
    with hf_lora.use_adapter(model, "b") as inner:
        assert inner is model
        with hf_lora.no_adapter(model):
            assert hf_lora.active_adapters(model) == ()
            with hf_lora.use_adapter(model, ["b", "a"]):
                assert hf_lora.active_adapters(model) == ("b", "a")
            assert hf_lora.active_adapters(model) == ()
        assert hf_lora.active_adapters(model) == ("b",)
    assert hf_lora.active_adapters(model) == ("a",)
    with pytest.raises(ZeroDivisionError), hf_lora.no_adapter(model):
        _ = 1 / 0
    assert hf_lora.active_adapters(model) == ("a",)
    for error in (KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), hf_lora.use_adapter(model, "b"):
            raise error
        assert hf_lora.active_adapters(model) == ("a",)


def test_a_block_may_be_entered_again():
    model = build(("a",), (), ())
    block = hf_lora.use_adapter(model, "b")
    for _ in range(3):
        with block:
            assert hf_lora.active_adapters(model) == ("b",)
        assert hf_lora.active_adapters(model) == ("a",)
    with block, hf_lora.no_adapter(model), block:
        assert hf_lora.active_adapters(model) == ("b",)
    assert hf_lora.active_adapters(model) == ("a",)


def test_generators_that_are_left_in_another_order_end_where_they_began():
    def streaming(model: nn.Module, name: str):
        with hf_lora.use_adapter(model, name):
            yield hf_lora.active_adapters(model)
            yield hf_lora.active_adapters(model)

    model = build(("a",), (), ())
    first, second = streaming(model, "b"), streaming(model, [])
    assert next(first) == ("b",)
    assert next(second) == ()
    first.close()  # the block below closes first
    assert hf_lora.active_adapters(model) == ()
    second.close()
    assert hf_lora.active_adapters(model) == ("a",)
    abandoned = streaming(model, "b")
    next(abandoned)
    del abandoned
    assert hf_lora.active_adapters(model) == ("a",)


def test_a_switch_inside_a_block_ends_with_it():
    model = build(("a",), (), ())
    with hf_lora.no_adapter(model):
        hf_lora.activate(model, "b")
        assert hf_lora.active_adapters(model) == ("b",)
    assert hf_lora.active_adapters(model) == ("a",)


def test_an_adapter_deleted_inside_a_block_does_not_come_back():
    model = build(("a", "b"), (), ())
    with hf_lora.no_adapter(model):
        hf_lora.delete_adapter(model, "a")
    assert hf_lora.active_adapters(model) == ("b",)
    assert torch.equal(answers(model), answers(model))
    again = hf_lora.use_adapter(model, "b")
    hf_lora.add_adapter(model, "c", "q_proj", r=1)
    hf_lora.activate(model, "c")
    hf_lora.delete_adapter(model, "b")
    with pytest.raises(hf_lora.UnknownAdapterError), again:
        raise AssertionError("the block was entered")
    again._entered = True  # or it would warn that it never was


def test_a_model_may_be_unwrapped_inside_a_block():
    model = build(("a",), (), ())
    with hf_lora.no_adapter(model):
        hf_lora.unwrap(model)
    assert type(model.layers[0].q_proj) is nn.Linear


def test_a_merge_inside_a_block_stays_merged():
    model = build(("a",), (), ())
    with hf_lora.use_adapter(model, "b"):
        hf_lora.merge(model)
    assert states(model) == (("a",), (), ("b",))
    hf_lora.unmerge(model)
    assert states(model) == (("a",), (), ())


def test_a_block_that_is_no_block_says_so():
    model = build(("a",), (), ())
    with pytest.warns(HfLoRAWarning, match="activate") as caught:
        hf_lora.use_adapter(model, "b")
    assert caught[0].filename == __file__
    assert hf_lora.active_adapters(model) == ("a",)
