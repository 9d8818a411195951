"""Experts in 4 bits: the oracle is the model with what 4 bits have left of them, in float64."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_lora
from hf_lora.errors import (
    BaseMismatchError,
    ConfigError,
    HfLoRAWarning,
    SaveError,
    StateError,
    TargetError,
)
from hf_lora.functional import packed
from hf_lora.functional.packed import PackedStack
from hf_lora.kinds.experts import LoRAExperts
from hf_lora.layers.quantized import numel, stored_bytes
from tests.integrations import training
from tests.kinds.expert_models import (
    PARTS,
    TOKENS,
    built,
    every,
    gpt_oss,
    llama4,
    loss_of,
    loud,
    mixtral,
    qwen3_moe,
)

pytest.importorskip("bitsandbytes", reason="it packs")

PARTS_OF = ("gate_up_proj", "down_proj")
FIELDS = {"targets": [*PARTS, "o_proj"], "r": 3, "alpha": 6}


def packed_model(make: Callable[[], Any], dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    return hf_lora.quantize_experts(built(make, dtype), **how)


def adapted(model: Any, **fields: Any) -> Any:
    torch.manual_seed(1)
    return loud(hf_lora.wrap(model, **{**FIELDS, **fields}))


def twin(make: Callable[[], Any], **fields: Any) -> Any:
    """The same adapter on plain experts with the numbers that 4 bits have left, in float64."""
    model = hf_lora.dequantize_experts(packed_model(make)).double()
    if make is not llama4:
        model.set_experts_implementation("eager")
    return adapted(model, **fields)


def both(make: Callable[[], Any]) -> tuple[Any, Any]:
    """A model on packed experts and its twin, with the same adapter."""
    model, exact = adapted(packed_model(make)), twin(make)
    named = dict(exact.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(named[name])
    return model, exact


def stacks(model: Any) -> list[PackedStack]:
    return [p for p in model.parameters() if isinstance(p, PackedStack)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@every
def test_outputs_and_gradients_are_those_of_what_four_bits_say(make: Callable[[], Any]):
    model, exact = both(make)
    named = dict(exact.named_parameters())
    ours, wide = model(TOKENS).logits, exact(TOKENS).logits
    torch.testing.assert_close(ours.double(), wide, rtol=1e-4, atol=1e-4)
    loss_of(ours).backward()
    loss_of(wide).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            scale = named[name].grad.abs().max()
            gap = (parameter.grad.double() - named[name].grad).abs().max()
            assert gap <= 1e-3 * scale, name


@every
def test_the_frozen_ones_compute_with_it_and_adapters_begin_there(make: Callable[[], Any]):
    plain, model = built(make), packed_model(make)
    exact = hf_lora.dequantize_experts(packed_model(make))
    frozen = logits(model)
    torch.testing.assert_close(frozen, logits(exact), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(frozen, logits(plain), rtol=1e-4, atol=1e-4)
    hf_lora.wrap(model, **FIELDS)
    torch.testing.assert_close(logits(model), frozen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "block"), [((3, 6, 5), 32), ((2, 16, 24), 64), ((2, 7, 33), 128)]
)
def test_each_expert_is_packed_as_bitsandbytes_packs_a_matrix(
    kind: str, dtype: torch.dtype, shape: tuple[int, int, int], block: int
):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    stack = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = packed.pack(stack, kind, block)
    for e, matrix in enumerate(stack):
        theirs = dequantize_4bit(*quantize_4bit(matrix, blocksize=block, quant_type=kind))
        assert torch.equal(made.matrix(e), theirs)
        assert made.matrix(e).dtype == dtype
    whole = packed.unpack(made)
    assert whole.shape == shape
    positions = torch.arange(0, whole.numel(), 3)
    values = made.numbers_at(positions)
    torch.testing.assert_close(values.to(dtype), whole.flatten()[positions], rtol=1e-2, atol=1e-6)


def test_only_experts_with_rows_are_unpacked_one_at_a_time(monkeypatch: pytest.MonkeyPatch):
    model = adapted(packed_model(qwen3_moe))
    layer = next(m for m in model.modules() if isinstance(m, LoRAExperts))
    seen: list[tuple[int, int]] = []
    matrix = PackedStack.matrix
    monkeypatch.setattr(PackedStack, "matrix", lambda s, e: seen.append((id(s), e)) or matrix(s, e))
    monkeypatch.setattr(packed, "unpack", None)
    rows = torch.randn(4, 32, requires_grad=True)
    chosen = torch.tensor([[1, 3]] * 4)
    layer(rows, chosen, torch.full((4, 2), 0.5)).sum().backward()
    assert {e for _, e in seen} == {1, 3}
    assert len(seen) == 2 * 2 * 2  # of two stacks, two experts, forward and backward


def test_dropout_and_its_gradients_keep_no_unpacked_matrix():
    model = adapted(packed_model(mixtral), dropout=0.3).train()
    layer = next(m for m in model.modules() if isinstance(m, LoRAExperts))
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    rows, chosen = torch.randn(5, 32, requires_grad=True), torch.tensor([[0, 1]] * 5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = layer(rows, chosen, torch.ones(5, 2)).sum()
    loss.backward()
    sizes = {tuple(getattr(layer, part).packing.shape) for part in PARTS_OF}
    assert kept
    assert not {*kept} & (sizes | {size[::-1] for size in sizes})


def test_memory_is_counted_as_it_is():
    plain, model = built(qwen3_moe), packed_model(qwen3_moe)
    before, after = hf_lora.plan(plain, **FIELDS), hf_lora.plan(model, **FIELDS)
    assert after.base_parameters == before.base_parameters
    assert after.parameters == before.parameters
    assert after.untouched == before.untouched
    wide = sum(t.numel() * 4 for n, t in plain.named_parameters() if ".experts." in n)
    small = sum(map(stored_bytes, stacks(model)))
    assert before.base_bytes - after.base_bytes == wide - small
    assert small / wide == pytest.approx((4 + 32 / 64) / 32, rel=0.05)
    assert sum(map(numel, stacks(model))) * 4 == wide
    assert hf_lora.summary(adapted(model)).adapters


def test_packing_takes_one_packed_stack_besides():
    """And what one expert takes: no second copy of a stack is made."""
    model = built(qwen3_moe)
    stack = max((p for n, p in model.named_parameters() if ".experts." in n), key=torch.numel)
    own, largest = stack.untyped_storage().data_ptr(), stack.numel()
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != own:
                made.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        packed.pack(stack, "nf4", 64)
    assert max(made) < largest  # bytes of the packed stack; the stack itself has four times these


@pytest.mark.parametrize("make", [qwen3_moe, gpt_oss])
def test_it_trains_saves_loads_and_is_taken_off(make: Callable[[], Any], tmp_path: Path):
    built(make).save_pretrained(tmp_path / "base")
    cls = type(built(make))
    model = hf_lora.quantize_experts(cls.from_pretrained(tmp_path / "base"))
    frozen, kept = logits(model), [stack.data.clone() for stack in stacks(model)]
    hf_lora.wrap(model, **FIELDS)
    run = training.run(tmp_path / "run", model=model, max_steps=4)
    assert training.checkpoints(run.folder) == ["checkpoint-4"]
    assert all(map(torch.equal, kept, [stack.data for stack in stacks(model)]))
    adapted = logits(model)
    assert not torch.equal(adapted, frozen)
    model.save_pretrained(tmp_path / "adapter")
    assert training.files(tmp_path / "adapter") == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = hf_lora.from_pretrained(tmp_path / "adapter", quantize_experts=True, trainable=True)
    assert len(stacks(again)) == len(stacks(model))
    torch.testing.assert_close(logits(again), adapted, rtol=1e-5, atol=1e-5)
    wide = hf_lora.from_pretrained(tmp_path / "adapter")  # onto the full base, as is usual
    assert not stacks(wide)
    assert (logits(wide) - adapted).abs().max() < (logits(wide)).abs().max()
    hf_lora.unwrap(model)
    assert torch.equal(logits(model), frozen)
    hf_lora.dequantize_experts(model)
    assert type(model) is cls
    assert not stacks(model)
    model.save_pretrained(tmp_path / "whole")
    opened = cls.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(opened), frozen, rtol=1e-4, atol=1e-4)


def test_a_training_that_was_cut_short_goes_on_to_the_same_bits(tmp_path: Path):
    def start(seed: int) -> Any:
        torch.manual_seed(seed)
        return hf_lora.wrap(packed_model(qwen3_moe), **FIELDS)

    whole = training.run(tmp_path / "whole", model=start(1))
    resumed = training.run(
        tmp_path / "second", model=start(9), resume=str(tmp_path / "whole" / "checkpoint-4")
    )
    first, second = (training.adapter_tensors(run.model) for run in (whole, resumed))
    assert training.same(first, second)


def test_evaluation_between_steps_does_not_end_the_training():
    """As it does for bitsandbytes' own layers on some processors."""
    model = adapted(packed_model(qwen3_moe))
    logits(model)
    loss_of(model.train()(TOKENS).logits).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_base_is_recognized_packed_or_not_and_another_is_not(tmp_path: Path):
    hf_lora.save(adapted(packed_model(qwen3_moe)), tmp_path / "packed")
    hf_lora.save(adapted(built(qwen3_moe)), tmp_path / "plain")
    for folder in ("packed", "plain"):
        hf_lora.load(built(qwen3_moe), tmp_path / folder)
        hf_lora.load(packed_model(qwen3_moe), tmp_path / folder)
    other = built(qwen3_moe)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj.mul_(-1)
    with pytest.raises(BaseMismatchError, match=r"experts\.down_proj"):
        hf_lora.load(hf_lora.quantize_experts(other), tmp_path / "packed")


def test_copies_pickles_and_conversions_compute_the_same(tmp_path: Path):
    model = adapted(packed_model(qwen3_moe))
    wanted = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), wanted)
        assert len(stacks(other)) == len(stacks(model))
    frozen = packed_model(qwen3_moe)
    again = packed_model(qwen3_moe)
    again.load_state_dict(frozen.state_dict())
    assert torch.equal(logits(again), logits(frozen))
    before = [stack.data.clone() for stack in stacks(frozen)]
    frozen.to(torch.bfloat16).to(torch.float32)
    assert all(map(torch.equal, before, [stack.data for stack in stacks(frozen)]))


def test_several_adapters_activation_checkpointing_and_a_view_of_the_base():
    model = packed_model(qwen3_moe)
    frozen = logits(model)
    adapted(model)
    hf_lora.add_adapter(model, "second", targets=PARTS, r=2)
    hf_lora.activate(model, ["default", "second"])
    loud(model)
    loss_of(model(TOKENS).logits).backward()
    kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train().gradient_checkpointing_enable()
    loss_of(model(TOKENS).logits).backward()
    for name, parameter in model.named_parameters():
        if name in kept:
            torch.testing.assert_close(parameter.grad, kept[name], rtol=1e-4, atol=1e-6)
    with hf_lora.no_adapter(model):
        assert torch.equal(logits(model), frozen)
    assert torch.equal(logits(hf_lora.base_view(model)), frozen)


class TestMergingRoundsAnew:
    def test_what_is_lost_is_told_and_unmerging_is_exact(self):
        model, exact = both(qwen3_moe)
        wanted, kept = logits(model), stacks(model)
        with pytest.warns(HfLoRAWarning, match=r"2 packed layers .*: the error is \d+% of the upd"):
            hf_lora.merge(model, requantize=True)
        merged = logits(model)
        assert not any(new is old for new, old in zip(stacks(model), kept, strict=True))
        hf_lora.unmerge(model)
        assert all(new is old for new, old in zip(stacks(model), kept, strict=True))
        assert torch.equal(logits(model), wanted)
        # as far as 4 bits go: what packing the exactly merged stacks gives
        again = hf_lora.quantize_experts(hf_lora.merge_and_unwrap(exact).float())
        torch.testing.assert_close(merged, logits(again), rtol=1e-3, atol=1e-3)

    def test_for_good(self):
        model = adapted(packed_model(qwen3_moe))
        with pytest.warns(HfLoRAWarning, match="rounded anew"):
            hf_lora.merge(model, requantize=True)
        merged = logits(model)
        model = hf_lora.merge_and_unwrap(model)
        assert torch.equal(logits(model), merged)
        assert not any("lora" in name for name, _ in model.named_parameters())


class TestWhatIsRefused:
    def test_to_merge_into_packed_experts(self):
        model = adapted(packed_model(qwen3_moe))
        wanted = logits(model)
        for verb in (hf_lora.merge, hf_lora.merge_and_unwrap):
            with pytest.raises(TargetError, match=r"mlp\.experts: its stacks are packed in 4 bits"):
                verb(model)
        assert torch.equal(logits(model), wanted)

    def test_to_save_the_whole(self, tmp_path: Path):
        model = packed_model(qwen3_moe)
        with pytest.raises(SaveError, match=r"experts \(2 in all\) is packed.*dequantize_experts"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_model_that_is_wrapped(self):
        model = adapted(built(qwen3_moe))
        with pytest.raises(StateError, match=r"have adapters.*unwrap"):
            hf_lora.quantize_experts(model)
        packed = adapted(packed_model(qwen3_moe))
        with pytest.raises(StateError, match="have adapters"):
            hf_lora.dequantize_experts(packed)

    def test_models_without_experts_and_those_that_are_packed(self):
        with pytest.raises(TargetError, match="no experts to pack"):
            hf_lora.quantize_experts(training.llama())
        with pytest.raises(TargetError, match="packed already"):
            hf_lora.quantize_experts(packed_model(qwen3_moe))
        with pytest.raises(TargetError, match="no experts that quantize_experts has packed"):
            hf_lora.dequantize_experts(built(qwen3_moe))

    @pytest.mark.parametrize("how", [{"kind": "int4"}, {"block": 48}])
    def test_other_ways_to_pack(self, how: dict[str, Any]):
        model = built(qwen3_moe)
        with pytest.raises(ConfigError, match="kind is one of nf4, fp4"):
            hf_lora.quantize_experts(model, **how)
        assert not stacks(model)

    def test_types_that_cannot_be_packed_and_weights_that_are_not_there(self):
        with pytest.raises(TargetError, match="float64, which is none"):
            hf_lora.quantize_experts(built(qwen3_moe, torch.float64))
        with pytest.raises(TargetError, match="is not in memory"):
            hf_lora.quantize_experts(built(qwen3_moe).to("meta"))

    def test_a_stack_that_somebody_has_replaced(self):
        model = packed_model(qwen3_moe)
        layer = model.model.layers[0].mlp.experts
        layer.down_proj = torch.nn.Parameter(layer.down_proj.data.clone(), requires_grad=False)
        with pytest.raises(StateError, match=r"The packed down_proj .* was replaced"):
            model(TOKENS)

    def test_a_loaded_base_that_is_to_be_packed(self, tmp_path: Path):
        hf_lora.save(adapted(built(qwen3_moe)), tmp_path)
        with pytest.raises(ConfigError, match="quantize_experts cannot be used"):
            hf_lora.from_pretrained(tmp_path, base=built(qwen3_moe), quantize_experts=True)
