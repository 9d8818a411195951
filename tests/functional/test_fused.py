"""The fused function against finite differences and against its plain twin."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from hf_lora.functional.composed import composed
from hf_lora.functional.fused import Layer, Update, fused
from hf_lora.functional.low_rank import low_rank
from hf_lora.functional.recompute import recompute_of

IN, OUTS, RANKS = 6, (5, 4), ((2, 3), (1,))
TYPE = torch.float64


def tensor(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=TYPE, requires_grad=grad)


def fused_in_type(x: torch.Tensor, given: Sequence[Layer]) -> Sequence[torch.Tensor]:
    return fused(x, given, TYPE)


Way = Callable[[torch.Tensor, Sequence[Layer]], Sequence[torch.Tensor]]


def factors() -> list[torch.Tensor]:
    """A and B of three updates: two on the first layer, one on the second."""
    torch.manual_seed(0)
    return [
        tensor(*shape)
        for out, ranks in zip(OUTS, RANKS, strict=True)
        for r in ranks
        for shape in ((r, IN), (out, r))
    ]


def layers(
    given: Sequence[torch.Tensor], dropout: float = 0.0, ys: Sequence[torch.Tensor] | None = None
) -> list[Layer]:
    torch.manual_seed(1)
    weights = [tensor(out, IN, grad=False) for out in OUTS]
    bias = tensor(OUTS[0], grad=False)
    a, b, c, d, e, f = given
    first = [Update(a, b, 0.5, dropout), Update(c, d, 2.0, dropout)]
    second = [Update(e, f, 1.5, dropout)]
    if ys is not None:
        return [Layer(first, y=ys[0]), Layer(second, y=ys[1])]
    return [Layer(first, weights[0], bias), Layer(second, weights[1])]


def plain(x: torch.Tensor, given: Sequence[Layer]) -> list[torch.Tensor]:
    outputs = []
    for layer in given:
        y = F.linear(x, layer.weight_OI, layer.bias_O) if layer.y is None else layer.y
        for update in layer.updates:
            y = y + low_rank(x, update.a_RI, update.b_OR, update.s)
        outputs.append(y)
    return outputs


@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN), (IN,), (0, IN), (2, 0, IN)])
@pytest.mark.parametrize("way", [fused_in_type, composed])
def test_outputs_and_gradients_are_those_of_the_plain_formula(way: Way, shape: tuple[int, ...]):
    given, x = factors(), tensor(*shape)
    ours, theirs = way(x, layers(given)), plain(x, layers(given))
    flow = [torch.randn_like(y) for y in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other)
    found = torch.autograd.grad(list(ours), [x, *given], flow)
    wanted = torch.autograd.grad(theirs, [x, *given], flow)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_finite_differences():
    given = factors()
    x = tensor(2, 3, IN)
    assert torch.autograd.gradcheck(lambda x, *g: tuple(fused(x, layers(g), TYPE)), (x, *given))


def test_finite_differences_with_dropout():
    def seeded(x: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        updates = layers(given, dropout=0.4)
        torch.manual_seed(7)
        return tuple(fused(x, updates, TYPE))

    assert torch.autograd.gradcheck(seeded, (tensor(2, 3, IN), *factors()))


def test_finite_differences_on_top_of_the_base_s_own_output():
    ys = [tensor(2, 3, out) for out in OUTS]
    assert torch.autograd.gradcheck(
        lambda x, one, two, *given: tuple(fused(x, layers(given, ys=(one, two)), TYPE)),
        (tensor(2, 3, IN), *ys, *factors()),
    )


def test_the_base_s_own_output_is_not_written_to():
    y = tensor(3, OUTS[0], grad=False)
    before = y.clone()
    fused(tensor(3, IN), [Layer(layers(factors())[0].updates, y=y)], TYPE)
    assert torch.equal(y, before)


def test_strides_of_the_input_and_of_the_gradient():
    given = factors()
    x = tensor(IN, 3, 2).permute(2, 1, 0)
    for reduce in (lambda y: y.sum(), lambda y: (y.permute(2, 0, 1) * 3).sum()):
        found = torch.autograd.grad(
            sum(map(reduce, fused(x, layers(given), TYPE))), given, retain_graph=True
        )
        wanted = torch.autograd.grad(
            sum(map(reduce, plain(x, layers(given)))), given, retain_graph=True
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_an_output_that_nobody_uses():
    given, x = factors(), tensor(3, IN)
    _, second = fused(x, layers(given), TYPE)
    found = torch.autograd.grad(second.sum(), [x, *given], allow_unused=True)
    wanted = torch.autograd.grad(plain(x, layers(given))[1].sum(), [x, *given], allow_unused=True)
    assert [g is None for g in found] == [g is None for g in wanted]
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other)


def test_only_what_is_wanted_gets_a_gradient():
    given = factors()
    for factor in given[:2]:
        factor.requires_grad_(False)
    x = tensor(3, IN, grad=False)
    sum(y.sum() for y in fused(x, layers(given), TYPE)).backward()
    assert x.grad is None
    assert all(factor.grad is None for factor in given[:2])
    wanted = torch.autograd.grad(sum(y.sum() for y in plain(x, layers(given))), given[2:])
    for factor, other in zip(given[2:], wanted, strict=True):
        torch.testing.assert_close(factor.grad, other)


def test_a_second_backward_is_right():
    given, x = factors(), tensor(3, IN)
    loss = sum(y.sum() for y in fused(x, layers(given), TYPE))
    first = torch.autograd.grad(loss, [x, *given], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *given])
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("on_top", [False, True])
def test_second_derivatives(dropout: float, on_top: bool):
    ys = [tensor(2, 3, out) for out in OUTS] if on_top else []

    def seeded(x: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        split = len(given) - len(ys)
        updates = layers(given[:split], dropout, given[split:] or None)
        torch.manual_seed(7)
        return tuple(fused(x, updates, TYPE))

    assert torch.autograd.gradgradcheck(seeded, (tensor(2, 3, IN), *factors(), *ys))


def test_second_derivatives_through_an_input_that_is_computed_again():
    def gated(gate: torch.Tensor, up: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.silu(gate) * up
        recipe = recompute_of(x)
        assert recipe is not None
        return fused(x, layers(given), TYPE, recipe)[1]

    assert torch.autograd.gradgradcheck(gated, (tensor(3, IN), tensor(3, IN), *factors()))


def test_a_second_derivative_after_a_step_is_refused():
    given, x = factors(), tensor(3, IN)
    loss = (fused(x, layers(given), TYPE)[0] ** 2).sum()
    with torch.no_grad():
        given[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN), (IN,)])
@pytest.mark.parametrize("on_top", [False, True])
def test_an_output_is_edited_in_place_as_another_layer_s(shape: tuple[int, ...], on_top: bool):
    given, x = factors(), tensor(*shape)
    ys = [tensor(*shape[:-1], out) for out in OUTS] if on_top else None

    def edited(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        first, second = outputs
        first /= 3
        first[..., :2] *= x[..., :2]
        second.view(-1).mul_(2)
        return [first.relu_(), second]

    with torch.no_grad():
        outside = fused(x, layers(given, ys=ys), TYPE)
    outside[0].mul_(x.sum())  # made without a graph, and brought into one
    flow = [torch.randn_like(y) for y in outside]
    found = torch.autograd.grad(edited(fused(x, layers(given, ys=ys), TYPE)), [x, *given], flow)
    wanted = torch.autograd.grad(edited(plain(x, layers(given, ys=ys))), [x, *given], flow)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_an_output_keeps_its_gradient_and_runs_hooks():
    given, x, seen = factors(), tensor(3, IN), []
    outputs = fused(x, layers(given), TYPE)
    for y in outputs:
        y.retain_grad()
        y.register_hook(lambda dy: (seen.append(dy), dy * 2)[1])
    sum((y**2).sum() for y in outputs).backward()
    assert len(seen) == 2
    for y in outputs:
        torch.testing.assert_close(y.grad, 4 * y.detach())


def test_an_output_that_nothing_trained_leads_to_needs_no_gradient():
    given, x = factors(), tensor(3, IN, grad=False)
    for factor in given[4:]:
        factor.requires_grad_(False)
    first, second = fused(x, layers(given), TYPE)
    assert first.requires_grad
    assert not second.requires_grad
    assert second.is_leaf
    second.add_(1)
    (first.sum() + second.sum()).backward()
    wanted = torch.autograd.grad(plain(x, layers(given))[0].sum(), given[:4])
    for factor, other in zip(given[:4], wanted, strict=True):
        torch.testing.assert_close(factor.grad, other)


def test_what_is_changed_in_place_before_the_backward_is_noticed():
    given, x = factors(), tensor(3, IN, grad=False)
    loss = fused(x, layers(given), TYPE)[0].sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_x_and_the_scaled_factors_are_kept():
    given, x, kept = factors(), tensor(3, IN), {}

    def note(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.data_ptr()] = saved
        return saved

    updates = layers(given)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        fused(x, updates, TYPE)
    own = {tensor.data_ptr() for tensor in (*given, *(layer.weight_OI for layer in updates))}
    stacked = (sum(r for ranks in RANKS for r in ranks), IN)
    assert [saved.shape for key, saved in kept.items() if key not in own] == [stacked, x.shape]
