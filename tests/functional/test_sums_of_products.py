"""A weight plus updates in factors: blocks of rows give what one sum gives, rounded once."""

import pytest
import torch

from hf_lora.functional import low_rank
from hf_lora.functional.low_rank import Product, dense, plus_products, product
from tests.rounding import assert_rounded_alike

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def updates(number: int, outs: int, ins: int) -> list[Product]:
    torch.manual_seed(0)
    shapes = [(number, outs, r, ins) for r in (4, 7)]
    return [Product(torch.randn(e, o, r), torch.randn(e, r, i)) for e, o, r, i in shapes]


def at_once(weight: torch.Tensor, products: list[Product], wide: torch.dtype) -> torch.Tensor:
    total = weight.to(wide)
    for each in products:
        total = total + dense(Product(*(factor.to(wide) for factor in each))).reshape(weight.shape)
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50, 30), (3, 20, 30), (50, 5, 3, 2), (2, 90)])
@pytest.mark.parametrize("block", [1, 100, 1 << 17])
def test_blocks_of_any_size_give_one_sum_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...], block: int
):
    monkeypatch.setattr(low_rank, "_BLOCK", block)
    number, *rest = shape if len(shape) == 3 else (1, *shape)
    weight, given = torch.randn(shape).to(dtype), updates(number, rest[0], weight_width(rest))
    kept = weight.clone()
    with torch.no_grad():
        found = plus_products(weight, given)
    recorded = plus_products(
        weight, [each._replace(left=each.left.requires_grad_()) for each in given]
    )
    wide = torch.promote_types(dtype, torch.float32)
    exact = at_once(weight, given, torch.float64)
    assert found.dtype == dtype
    assert found.shape == weight.shape
    assert torch.equal(weight, kept)
    plain = at_once(weight, given, wide).to(dtype)
    assert_rounded_alike((found, plain, exact), (recorded, plain, exact))
    assert recorded.requires_grad


def weight_width(rest: list[int]) -> int:
    return torch.Size(rest[1:]).numel()


@torch.no_grad()
def test_weights_in_another_order_keep_it():
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    given = updates(1, 6, 36)
    found = plus_products(weight, given)
    assert found.stride() == weight.stride()
    torch.testing.assert_close(found, at_once(weight, given, torch.float64).float())
    turned = torch.randn(30, 50).t()
    given = updates(1, 50, 30)
    found = plus_products(turned, given)
    assert found.stride() == turned.stride()
    torch.testing.assert_close(found, at_once(turned, given, torch.float64).float())


@torch.no_grad()
def test_nothing_to_add_gives_a_copy():
    weight = torch.randn(3, 3)
    found = plus_products(weight, [])
    assert torch.equal(found, weight)
    assert found.data_ptr() != weight.data_ptr()
    assert plus_products(torch.empty(0, 3), updates(1, 0, 3)).shape == (0, 3)


def test_factors_of_float64_are_summed_in_it():
    weight, a, b = torch.randn(40, 30), torch.randn(5, 30).double(), torch.randn(40, 5).double()
    found = plus_products(weight, [product(a, b, 2.0)])
    assert torch.equal(found, (weight.double() + 2.0 * b @ a).float())
