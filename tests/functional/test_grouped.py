"""Products for each expert's rows, and low-rank ones on top: equal to dense matrices in float64."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from hf_lora.functional import grouped
from hf_lora.functional.experts import Stacks, Update, experts, experts_plain
from hf_lora.functional.grouped import (
    Factors,
    Routed,
    grouped_outer,
    grouped_product,
    stack_norm,
    stack_product,
)
from hf_lora.functional.low_rank import dense
from tests.rounding import assert_rounded_alike

E, IN, M, N, K = 5, 6, 4, 9, 2
"""The last expert gets no row."""


class Case(NamedTuple):
    x: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor
    stacks: Stacks
    up: list[Factors]
    down: list[Factors]

    def leaves(self) -> list[torch.Tensor]:
        factors = [tensor for each in (*self.up, *self.down) for tensor in (each.a, each.b)]
        return [self.x, self.weights, *factors]


def gate(rows: torch.Tensor) -> torch.Tensor:
    left, right = rows.chunk(2, -1)
    return F.silu(left) * right


def case(
    ups: tuple[int, ...] = (3, 2),
    downs: tuple[int, ...] = (3,),
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Case:
    drawn = torch.Generator().manual_seed(7)

    def leaf(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=drawn, dtype=torch.float64)
        return (values / 2).to(dtype).requires_grad_()

    def factors(r: int, wide_in: int, wide_out: int) -> Factors:
        return Factors(leaf(E * r, wide_in), leaf(wide_out, r * E), r, 1.5 / r)

    biases = (leaf(E, 2 * M).detach(), leaf(E, IN).detach()) if bias else (None, None)
    stacks = Stacks(leaf(E, IN, 2 * M).detach(), leaf(E, M, IN).detach(), *biases, gate)
    chosen = torch.stack([torch.randperm(E - 1, generator=drawn)[:K] for _ in range(N)])
    return Case(
        leaf(N, IN),
        leaf(N, K),
        chosen,
        stacks,
        [factors(r, IN, 2 * M) for r in ups],
        [factors(r, M, IN) for r in downs],
    )


def in_full(it: Case) -> torch.Tensor:
    """What it means, from one whole matrix for each expert."""

    def whole(stack: torch.Tensor, updates: list[Factors]) -> torch.Tensor:
        total = stack.transpose(1, 2)
        for each in updates:
            a, b = each.a.view(E, each.r, -1), each.b.view(len(each.b), each.r, E)
            total = total + each.s * torch.einsum("ore,eri->eoi", b, a)
        return total

    up, down = whole(it.stacks.up, it.up), whole(it.stacks.down, it.down)
    total: Any = 0
    for k in range(K):
        e = it.chosen[:, k]
        between = torch.einsum("noi,ni->no", up[e], it.x)
        between = between if it.stacks.up_bias is None else between + it.stacks.up_bias[e]
        out = torch.einsum("noi,ni->no", down[e], it.stacks.gate(between))
        out = out if it.stacks.down_bias is None else out + it.stacks.down_bias[e]
        total = total + it.weights[:, k : k + 1] * out
    return total


def ours(it: Case) -> torch.Tensor:
    return experts(it.x, it.weights, Routed(it.chosen, E), it.stacks, it.up, it.down)


def plain(it: Case) -> torch.Tensor:
    each = [Update(tuple(part), (0.0,) * len(part)) for part in (it.up, it.down)]
    return experts_plain(it.x, it.weights, Routed(it.chosen, E), it.stacks, *each)


def with_gradients(it: Case, found: torch.Tensor) -> list[torch.Tensor]:
    wide = torch.linspace(-1, 1, found.numel()).view_as(found).to(found.dtype)
    return [found, *torch.autograd.grad(found, it.leaves(), wide)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("ups", "downs"), [((3, 2), (3,)), ((2,), ()), ((), (1, 2)), ((), ())])
def test_outputs_and_gradients_are_those_of_dense_matrices(
    ups: tuple[int, ...], downs: tuple[int, ...], bias: bool
):
    it = case(ups, downs, bias)
    want = with_gradients(it, in_full(it))
    for found in (ours(it), plain(it)):
        torch.testing.assert_close(with_gradients(it, found), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_rounded_as_its_plain_twin_is(dtype: torch.dtype):
    it = case(dtype=dtype)

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().double().requires_grad_()

    right = it._replace(
        x=wide(it.x),
        weights=wide(it.weights),
        stacks=Stacks(*(t.double() for t in it.stacks[:4] if t is not None), gate),
        up=[each._replace(a=wide(each.a), b=wide(each.b)) for each in it.up],
        down=[each._replace(a=wide(each.a), b=wide(each.b)) for each in it.down],
    )
    want = with_gradients(right, in_full(right))
    assert_rounded_alike((with_gradients(it, ours(it)), with_gradients(it, plain(it)), want))


def test_what_needs_no_gradient_gets_none():
    it = case()
    frozen = it._replace(x=it.x.detach(), weights=it.weights.detach())
    y = ours(frozen)
    y.sum().backward()
    assert frozen.x.grad is None
    assert all(f.a.grad is not None and f.b.grad is not None for f in (*it.up, *it.down))
    assert not it.up[0].a.grad.view(E, 3, IN)[-1].any()  # type: ignore[union-attr]
    assert it.up[0].a.grad.view(E, 3, IN)[0].any()  # type: ignore[union-attr]


def test_what_is_kept_grows_with_routed_rows_and_not_with_experts():
    def kept(it: Case) -> int:
        held: dict[int, int] = {}
        known = {
            t.untyped_storage().data_ptr() for t in (*it.leaves(), *it.stacks[:4]) if t is not None
        }

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours(it)
        return sum(held.values())

    it = case()
    rows = N * K
    rank = sum(each.r for each in it.up)
    assert kept(it) == rows * (2 * M + rank) * it.x.element_size()


def test_grouped_products_are_those_of_each_experts_rows():
    it = case()
    routed = Routed(it.chosen, E)
    rows = it.x.detach()[routed.token]
    each = [routed.expert == e for e in range(E)]
    want = torch.cat([rows[mine] @ it.stacks.up[e] for e, mine in enumerate(each)])
    found = grouped_product(rows, it.stacks.up, routed)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(
        grouped_product(rows, it.stacks.up, routed, onto=found.clone()), 2 * want
    )
    outer = torch.stack([rows[mine].t() @ want[mine] for mine in each])
    torch.testing.assert_close(grouped_outer(rows, want, routed), outer)
    assert not outer[-1].any()
    counts = it.weights.detach().reshape(-1)[routed.order]
    assert torch.equal(routed.unsorted(counts), it.weights)


def test_the_grouped_kernel_gives_what_the_loop_gives(monkeypatch: pytest.MonkeyPatch):
    """On a GPU it computes instead of the loop; PyTorch has it for CPUs as well."""
    it = case(bias=False, dtype=torch.bfloat16)
    drawn = torch.Generator().manual_seed(1)

    def wide(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=drawn) / 4).bfloat16().requires_grad_()

    it = it._replace(
        x=wide(N, 16),
        stacks=Stacks(wide(E, 16, 16).detach(), wide(E, 8, 16).detach(), None, None, gate),
        up=[Factors(wide(E * 3, 16), wide(16, 3 * E), 3, 0.5)],
        down=[Factors(wide(E * 3, 8), wide(16, 3 * E), 3, 0.5)],
    )
    loop = with_gradients(it, ours(it))
    calls = []
    kernel = F.grouped_mm

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(grouped, "_kernel_runs_on", lambda device: True)
    monkeypatch.setattr(F, "grouped_mm", counted)
    found = with_gradients(it, ours(it))
    # the forward's, the base's backward, the factors', and the rows of A that are made again
    assert len(calls) == 6 + 2 + 8 + 1
    for one, other in zip(found, loop, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


def test_the_dense_update_and_its_norm_are_those_of_the_factors():
    factors = case().up[0]
    delta = dense(stack_product(factors, turned=False))
    for e in range(E):
        b, a = factors.b[:, e::E], factors.a[3 * e : 3 * e + 3]
        torch.testing.assert_close(delta[e], factors.s * (b @ a).detach())
    assert stack_norm(factors) == pytest.approx(float(delta.norm()))
