"""The measure of rounding: it lets other sums pass, and neither roundings more nor a fault."""

import pytest
import torch

from tests.rounding import Trial, assert_rounded_alike


def sums(wide: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> Trial:
    """Return a product summed in parts, the plain one, and the exact one."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(40, 40, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    ours = torch.zeros(40, 40)
    for x, y in zip(a.split(2, dim=1), b.split(2), strict=True):
        ours = ours + x @ y
        ours = ours if wide else ours.bfloat16().float()
    return ours.to(dtype), (a @ b).to(dtype), exact


def test_another_order_of_sums_passes():
    assert_rounded_alike(sums(wide=True))
    assert_rounded_alike(*(sums(wide=True, seed=seed) for seed in range(6)))
    assert_rounded_alike(sums(wide=True, dtype=torch.bfloat16))


@pytest.mark.parametrize("trials", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundings_too_many_do_not(dtype: torch.dtype, trials: int):
    with pytest.raises(AssertionError, match="times as far away as the plain way"):
        assert_rounded_alike(*(sums(wide=False, dtype=dtype, seed=n) for n in range(trials)))


def test_a_fault_in_one_trial_of_many_does_not():
    trials = [sums(wide=True, seed=seed) for seed in range(6)]
    ours, plain, exact = trials[2]
    trials[2] = ours + 1e-3, plain, exact
    with pytest.raises(AssertionError):
        assert_rounded_alike(*trials)


def test_what_is_not_finite_or_of_another_shape_or_name_does_not():
    ours, plain, exact = sums(wide=True)
    for wrong in (ours * torch.nan, ours[:1], [], {"a": ours}):
        with pytest.raises((AssertionError, ValueError)):
            assert_rounded_alike((wrong, plain, exact))
    with pytest.raises(AssertionError):
        assert_rounded_alike(({"a": ours}, {"a": plain}, {"b": exact}))


def test_what_the_plain_way_has_exactly_may_be_off_by_one_rounding():
    exact = torch.randn(50, dtype=torch.float64)
    assert_rounded_alike((exact.float(), exact, exact))
    with pytest.raises(AssertionError):
        assert_rounded_alike((exact.bfloat16().float(), exact, exact))
