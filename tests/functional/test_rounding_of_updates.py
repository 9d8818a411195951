"""How far in 16 bits each way is from float64, on the same inputs: outputs and all gradients."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F

from hf_lora.functional.composed import composed
from hf_lora.functional.fused import Layer, Update, fused
from hf_lora.functional.low_rank import low_rank
from tests.rounding import Trial, assert_rounded_alike, error

N, IN, OUTS, S = 70, 48, (40, 24), 2.0
DTYPES = [torch.bfloat16, torch.float16]
Found = dict[str, list[torch.Tensor]]
Way = Callable[[torch.Tensor, Sequence[Layer]], Sequence[torch.Tensor]]


def in_float32(x: torch.Tensor, layers: Sequence[Layer]) -> Sequence[torch.Tensor]:
    """The fused way with the updates' products in float32."""
    return fused(x, layers, x.dtype, update_dtype=torch.float32)


def in_16_bits(x: torch.Tensor, layers: Sequence[Layer]) -> Sequence[torch.Tensor]:
    """The fused way with all products in 16 bits."""
    return fused(x, layers, x.dtype)


def plain(x: torch.Tensor, layers: Sequence[Layer]) -> list[torch.Tensor]:
    """The formula in the type of x, operation by operation: PEFT's with 16-bit adapters."""
    outputs = []
    for layer in layers:
        y = F.linear(x, layer.weight_OI) if layer.y is None else layer.y
        for u in layer.updates:
            y = y + low_rank(x, u.a_RI, u.b_OR, u.s)
        outputs.append(y)
    return outputs


class Case:
    """An input, gradients of the outputs, and two layers: one update on one, two on the other."""

    def __init__(self, seed: int, dtype: torch.dtype, on_top: bool):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * scale

        self.on_top = on_top
        self.x = draw(N, IN).to(dtype)
        self.dys = [draw(N, out, scale=0.1).to(dtype) for out in OUTS]
        self.bases = [
            (draw(N, out) if on_top else draw(out, IN, scale=IN**-0.5)).to(dtype) for out in OUTS
        ]
        self.factors = [
            (draw(r, IN, scale=IN**-0.5), draw(out, r, scale=0.1))
            for out, ranks in zip(OUTS, ((4,), (2, 3)), strict=True)
            for r in ranks
        ]

    def run(self, way: Way, wide: bool = False) -> Found:
        """Return what a way computes, in float64 if ``wide``."""

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.double() if wide else tensor.clone()).requires_grad_()

        x, factors = cast(self.x), [(cast(a), cast(b)) for a, b in self.factors]
        updates = [Update(a, b, S) for a, b in factors]
        layers = [
            Layer(own, y=cast(base)) if self.on_top else Layer(own, cast(base).detach())
            for own, base in zip((updates[:1], updates[1:]), self.bases, strict=True)
        ]
        ys = way(x, layers)
        wanted = [x, *(a for a, _ in factors), *(b for _, b in factors)]
        dys = [dy.to(y.dtype) for dy, y in zip(self.dys, ys, strict=True)]
        dx, *rest = torch.autograd.grad(list(ys), wanted, dys)
        return {"y": list(ys), "dx": [dx], "da": rest[:3], "db": rest[3:]}


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for seed in range(12):
        yield Case(seed, dtype, on_top=bool(seed % 2))


def compared(ours: Way, other: Way, dtype: torch.dtype) -> dict[str, list[Trial]]:
    """Return the trials of all cases for each kind of result."""
    trials: dict[str, list[Trial]] = {"y": [], "dx": [], "da": [], "db": []}
    for case in cases(dtype):
        exact = case.run(plain, wide=True)
        found, theirs = case.run(ours), case.run(other)
        for kind, of_kind in trials.items():
            of_kind.append((found[kind], theirs[kind], exact[kind]))
    return trials


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_float32_nothing_is_further_from_float64_than_composed(dtype: torch.dtype):
    for trials in compared(in_float32, composed, dtype).values():
        assert_rounded_alike(*trials)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_float32_what_has_16_bits_is_in_the_sum_as_close_as_composed(dtype: torch.dtype):
    trials = compared(in_float32, composed, dtype)
    for kind in ("y", "dx"):
        ours = sum(error(found, exact) for found, _, exact in trials[kind])
        theirs = sum(error(other, exact) for _, other, exact in trials[kind])
        assert ours <= 1.001 * theirs  # of y the same numbers but for ties


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_float32_factors_get_gradients_that_are_rounded_once(dtype: torch.dtype):
    trials = compared(in_float32, in_16_bits, dtype)
    for kind in ("da", "db"):
        for found, in_16, exact in trials[kind]:
            assert error(found, exact) < error(in_16, exact) / 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [in_16_bits, composed])
def test_every_way_is_as_close_to_float64_as_16_bit_operations(way: Way, dtype: torch.dtype):
    for trials in compared(way, plain, dtype).values():
        assert_rounded_alike(*trials)


def test_the_update_and_the_base_s_output_are_added_before_they_are_rounded():
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    # 1 + 2**-8 lies half way between two numbers of bfloat16; a trace more decides
    a_RI, b_OR = torch.tensor([[1.0, 0.0]]), torch.tensor([[2**-8 + 2**-18]])
    layer = Layer([Update(a_RI, b_OR, 1.0)], weight)
    for way in (in_float32, composed):
        assert way(x, [layer])[0].item() == 1 + 2**-7


def test_updates_of_one_layer_are_summed_before_they_are_rounded():
    x, weight = (torch.tensor([[1.0]], dtype=torch.bfloat16) for _ in range(2))
    third = [Update(torch.tensor([[1.0]]), torch.tensor([[2**-8 / 1.5]]), 1.0)] * 3
    for way in (in_float32, composed):  # each alone would be rounded away
        assert way(x, [Layer(third, weight)])[0].item() == 1 + 2**-7


@pytest.mark.parametrize("way", [in_float32, composed])
def test_h_may_be_larger_than_float16_can_hold(way: Way):
    x = torch.full((3, IN), 200.0, dtype=torch.float16, requires_grad=True)
    a_RI = torch.full((2, IN), 30.0, requires_grad=True)
    b_OR = torch.full((4, 2), 1e-6, requires_grad=True)
    weight = torch.zeros(4, IN, dtype=torch.float16)
    (y,) = way(x, [Layer([Update(a_RI, b_OR, 2.0)], weight)])
    expected = 2 * IN * 200.0 * 30.0 * 2 * 1e-6
    torch.testing.assert_close(y, torch.full_like(y, expected))
    grads = torch.autograd.grad(y.float().sum(), [x, a_RI, b_OR])
    assert all(grad.isfinite().all() for grad in grads)


def test_second_derivatives_are_in_float32_too():
    case = Case(0, torch.bfloat16, on_top=False)
    a_RI, b_OR = (factor.requires_grad_() for factor in case.factors[0])
    x = case.x.requires_grad_()

    def gradients(create_graph: bool) -> tuple[torch.Tensor, ...]:
        (y,) = in_float32(x, [Layer([Update(a_RI, b_OR, S)], case.bases[0])])
        return torch.autograd.grad(y, [x, a_RI, b_OR], case.dys[0], create_graph=create_graph)

    once, again = gradients(create_graph=False), gradients(create_graph=True)
    torch.testing.assert_close(again[1:], once[1:])
    assert error(again[:1], once[:1]) < torch.finfo(torch.bfloat16).eps
    penalty = sum(grad.float().square().sum() for grad in again)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(penalty, [x, a_RI, b_OR]))


def test_with_dropout_gradients_are_those_of_what_was_kept():
    case = Case(0, torch.bfloat16, on_top=False)
    found = {}
    for dtype, update_dtype in ((torch.bfloat16, torch.float32), (torch.float64, None)):
        x = case.x.to(dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        a_RI, b_OR = (factor.to(wide).requires_grad_() for factor in case.factors[0])
        layer = Layer([Update(a_RI, b_OR, S, dropout=0.5)], case.bases[0].to(dtype))
        torch.manual_seed(0)
        (y,) = fused(x, [layer], dtype, update_dtype=update_dtype)
        found[dtype] = (y, *torch.autograd.grad(y, [x, a_RI, b_OR], case.dys[0].to(dtype)))
    for ours, exact in zip(*found.values(), strict=True):
        assert error(ours, exact) < torch.finfo(torch.bfloat16).eps
