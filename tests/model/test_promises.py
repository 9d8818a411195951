"""The promises of DESIGN.md that are about the model in memory: 1, 2, 4 and 9."""

import copy
import io
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import hf_lora
from tests.model.models import Case, answer, each_case, each_floating_case, train_step
from tests.snapshot import digest, snapshot
from tests.tiny import scramble


def added(model: nn.Module, before: nn.Module) -> set[str]:
    """Return the keys that one model has and the other has not."""
    return model.state_dict().keys() - before.state_dict().keys()


@each_case
class TestPromise1Names:
    """``wrap`` renames nothing and replaces no Parameter; ``unwrap`` gives the module tree back."""

    def test_every_key_and_parameter_stays_and_only_ours_are_added(self, case: Case):
        model = case.build()
        keys = list(model.state_dict())
        parameters = {name: id(p) for name, p in model.named_parameters()}
        modules = {path: id(module) for path, module in model.named_modules()}
        cls = type(model)
        assert hf_lora.wrap(model, **case.fields) is model
        after = dict(model.named_parameters())
        assert {name: id(after[name]) for name in parameters} == parameters
        assert {path: id(module) for path, module in model.named_modules()} == modules
        assert isinstance(model, cls)
        now = list(model.state_dict())
        assert [key for key in now if key in keys] == keys
        new = [key.rsplit(".", 1)[-1] for key in now if key not in keys]
        assert new
        assert all(name.startswith("lora_") for name in new)

    def test_unwrap_leaves_nothing_behind(self, case: Case):
        model = case.build()
        # in eval mode bitsandbytes packs weights for inference; wrapping takes that back
        model.train(not case.floating)
        expected = answer(model, case)
        before = snapshot(model)
        hf_lora.wrap(model, **case.fields)
        hf_lora.add_adapter(model, "b", **case.fields | {"r": 1})
        hf_lora.add_adapter(model, "c", **{k: v for k, v in case.fields.items() if k != "train"})
        scramble(model)
        train_step(model.train(), case)
        model.train(not case.floating)
        if case.floating:
            hf_lora.merge(model)
        assert hf_lora.unwrap(model) is model
        assert snapshot(model) == before
        assert torch.equal(answer(model, case), expected)

    def test_it_can_be_wrapped_again_and_again(self, case: Case):
        model = case.build()
        before = snapshot(model)
        for _ in range(3):
            hf_lora.unwrap(hf_lora.wrap(model, **case.fields))
        assert snapshot(model) == before

    def test_a_wrap_that_fails_leaves_nothing_behind(self, case: Case):
        model = case.build()
        before = snapshot(model)
        named = re.escape(hf_lora.plan(model, **case.fields).targets[0].path) or "(?:)"
        wrongs = (
            {"r": 10_000, "targets": [named], "overrides": {}},
            {"targets": ["nothing_of_the_kind"]},
            {"exclude": ["nor_this"]},
        )
        for wrong in wrongs:
            with pytest.raises(hf_lora.TargetError):
                hf_lora.wrap(model, **case.fields | wrong)
            assert snapshot(model) == before

    def test_the_state_dict_goes_round_strictly(self, case: Case):
        model = hf_lora.wrap(case.build(), **case.fields)
        scramble(model)
        twin = hf_lora.wrap(case.build(), **case.fields)
        if case.floating:
            twin.load_state_dict(model.state_dict(), strict=True)
        else:  # bitsandbytes' 4-bit state loads through its own classes; ours by name
            ours = {key: model.state_dict()[key] for key in added(model, case.build())}
            assert not twin.load_state_dict(ours, strict=False).unexpected_keys
        assert torch.equal(answer(twin, case), answer(model, case))
        plain = case.build().state_dict()
        result = twin.load_state_dict(plain, strict=False)
        assert set(result.missing_keys) >= added(twin, case.build())
        assert torch.equal(answer(twin, case), answer(model, case))


@each_case
class TestPromise2OnlyWhatWasAskedTrains:
    """Everything else has ``requires_grad=False``; ``unwrap`` restores each flag as it was."""

    def test_the_adapters_tensors_require_gradients_and_nothing_else(self, case: Case):
        model = case.build()
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        new = added(hf_lora.wrap(case.build(), **case.fields), model)
        hf_lora.wrap(model, **case.fields)
        every = dict(model.named_parameters(remove_duplicate=False))
        trains = {name for name, p in every.items() if p.requires_grad}
        buffers = {name for name, _ in model.named_buffers()}
        assert trains == new - buffers
        hf_lora.unwrap(model)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags

    def test_a_step_changes_them_and_no_byte_of_anything_else(self, case: Case):
        model = case.build()
        base = {key: digest(t) for key, t in model.state_dict().items()}
        hf_lora.wrap(model, **case.fields)
        scramble(model)
        before = {key: digest(t) for key, t in model.state_dict().items()}
        # the norms' running means are no parameters, but the copy has its own
        for _ in range(3):
            train_step(model.train(), case)
        after = {key: digest(t) for key, t in model.state_dict().items()}
        assert {key: after[key] for key in base} == base
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {key for key in after if after[key] != before[key]} >= trains


@each_floating_case
class TestPromise4TheBaseIsNeverWritten:
    """Except by ``merge``; ``unmerge`` restores the exact bytes, after any number of cycles."""

    def test_whatever_is_done_every_byte_of_the_base_stays(self, case: Case):
        model = case.build()
        base = {key: digest(t) for key, t in model.state_dict().items()}
        objects = {name: id(p) for name, p in model.named_parameters()}

        def unchanged() -> bool:
            now, parameters = model.state_dict(), dict(model.named_parameters())
            same = all(digest(now[key]) == base[key] for key in base)
            return same and all(id(parameters[name]) == objects[name] for name in objects)

        hf_lora.wrap(model, **case.fields)
        scramble(model)
        answer(model, case)
        assert unchanged()
        train_step(model.train(), case)
        model.eval()
        hf_lora.add_adapter(model, "b", **case.fields | {"r": 1})
        hf_lora.activate(model, "b")
        answer(model, case)
        assert unchanged()
        for _ in range(10):
            hf_lora.merge(model)
            answer(model, case)
            hf_lora.unmerge(model)
        assert unchanged()
        hf_lora.delete_adapter(model, "default")
        hf_lora.unwrap(model)
        assert unchanged()

    def test_a_merge_itself_writes_to_none_of_the_bases_tensors(self, case: Case):
        model = hf_lora.wrap(case.build(), **case.fields)
        scramble(model)
        held = dict(model.state_dict(keep_vars=True))
        before = {key: digest(t) for key, t in held.items()}
        hf_lora.merge(model)
        assert {key: digest(t) for key, t in held.items()} == before
        merged = model.state_dict()
        changed = [key for key in merged if digest(merged[key]) != before[key]]
        assert changed
        assert not any("lora_" in key for key in changed)


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@each_case
class TestPromise9Deterministic:
    """Equal inputs give equal outputs however often they are called."""

    def test_an_answer_does_not_depend_on_what_was_asked_before(self, case: Case):
        model = hf_lora.wrap(case.build(), **case.fields)
        scramble(model)
        first = answer(model, case)
        for _ in range(20):
            with hf_lora.no_adapter(model):
                answer(model, case)
            assert torch.equal(answer(model, case), first)
        if case.floating:
            hf_lora.unmerge(hf_lora.merge(model))
        assert torch.equal(answer(model, case), first)

    def test_equal_seeds_give_equal_adapters(self, case: Case):
        states = []
        for _ in range(2):
            model = case.build()
            torch.manual_seed(4)
            states.append(hf_lora.wrap(model, **case.fields).state_dict())
        assert [(k, digest(t)) for k, t in states[0].items()] == [
            (k, digest(t)) for k, t in states[1].items()
        ]

    def test_a_start_does_not_change_the_answer(self, case: Case):
        model = case.build()
        expected = answer(model, case)
        hf_lora.wrap(model, **case.fields)
        exact = case.floating  # packing for inference, switched off by wrap, rounds otherwise
        got = answer(model, case)
        assert torch.equal(got, expected) if exact else torch.allclose(got, expected, atol=0.05)

    @pytest.mark.parametrize("make", [by_deepcopy, by_pickle])
    def test_a_copy_answers_equally_and_is_a_model_of_its_own(
        self, case: Case, make: Callable[[nn.Module], nn.Module]
    ):
        model = hf_lora.wrap(case.build(), **case.fields)
        scramble(model)
        twin = make(model)
        first = answer(model, case)
        assert torch.equal(answer(twin, case), first)
        hf_lora.activate(twin, ())
        hf_lora.freeze(twin, "default")
        assert torch.equal(answer(model, case), first)
        assert any(p.requires_grad for p in model.parameters())
        hf_lora.unwrap(twin)
        assert torch.equal(answer(model, case), first)
