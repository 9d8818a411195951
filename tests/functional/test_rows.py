"""Rows whose scales are apart: the same products as with x itself, for every kind of norm."""

from collections.abc import Callable

import pytest
import torch

from hf_lora.functional.recompute import Expression, recompute_of, recomputed, recomputed_rows
from tests.rounding import assert_rounded_alike

WIDTH, Q = 40, 6


def llama(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = hidden.float() if hidden.dtype != torch.float64 else hidden
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(hidden.dtype)


def gemma(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = hidden.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (normed * (1.0 + weight.float())).type_as(hidden)


def viewed(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return llama(hidden, weight).view(-1, WIDTH)


NORMS: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [llama, gemma, viewed]


def products(
    norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype, trained: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], bool]:
    """Return x Aᵀ and dhᵀ x: as rows give them, of x itself, in float64; and whether apart."""
    torch.manual_seed(0)
    hidden = (3 * torch.randn(2, 5, WIDTH)).to(dtype).requires_grad_()
    weight = (1 + torch.rand(WIDTH)).to(dtype).requires_grad_(trained)
    own = norm(hidden, weight)
    recipe = recompute_of(own)
    assert recipe is not None
    rows = recomputed_rows(recipe.expression, recipe.kept, WIDTH, dtype)
    a_QI, dh_NQ = torch.randn(Q, WIDTH).to(dtype), torch.randn(10, Q).to(dtype)
    x_NI = norm(hidden.double(), weight.double()).detach().reshape(10, WIDTH)
    found = [rows.times(a_QI), rows.under(dh_NQ)]
    assert all(one.dtype == dtype for one in found)
    narrow_NI = own.detach().reshape(10, WIDTH)
    plain = [narrow_NI @ a_QI.t(), dh_NQ.t() @ narrow_NI]
    exact = [x_NI @ a_QI.double().t(), dh_NQ.double().t() @ x_NI]
    apart = rows.by_row_N1 is not None or rows.by_column_I is not None
    return found, plain, exact, apart


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_x(
    norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    trained: bool,
):
    found, plain, exact, apart = products(norm, dtype, trained)
    assert_rounded_alike((found, plain, exact))
    # what is not scaled yet may be too large for float16
    assert apart == (dtype != torch.float16)


def test_large_activations_do_not_overflow_in_float16():
    hidden = torch.full((2, WIDTH), 3e5, requires_grad=True)
    x = llama(hidden, torch.ones(WIDTH)).to(torch.float16)
    recipe = recompute_of(x)
    assert recipe is not None
    rows = recomputed_rows(recipe.expression, recipe.kept, WIDTH, torch.float16)
    assert torch.equal(rows.core_NI, x)


TWICE = ("mul", ("mul", ("kept", 0), ("kept", 1)), ("kept", 2))


@pytest.mark.parametrize(
    ("expression", "shapes"),
    [
        (("mul", ("silu", ("kept", 0)), ("kept", 1)), [(4, WIDTH), (4, WIDTH)]),
        (TWICE, [(4, WIDTH), (4, 1), (4, 1)]),
        (TWICE, [(4, WIDTH), (WIDTH,), (WIDTH,)]),
        (("mul", ("kept", 0), ("kept", 1)), [(4, WIDTH), ()]),
        (("mul", ("kept", 0), ("kept", 1)), [(2, 2, WIDTH), (2, 1, 1)]),
    ],
)
def test_what_is_no_such_product_is_multiplied_out(
    expression: Expression, shapes: list[tuple[int, ...]]
):
    kept = [torch.randn(shape) for shape in shapes]
    rows = recomputed_rows(expression, kept, WIDTH, torch.float32)
    assert rows.by_row_N1 is None
    assert rows.by_column_I is None
    assert torch.equal(rows.core_NI, recomputed(expression, kept).view(4, WIDTH))
