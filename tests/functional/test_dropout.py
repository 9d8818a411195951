"""Masks: the right share, nothing in common, the same after the same seed."""

import math

import pytest
import torch

from hf_lora.functional.dropout import keep_mask, masked, unpacked
from hf_lora.functional.fused import Layer, Update, fused

CPU = torch.device("cpu")
SHAPE = torch.Size((1000, 1003))  # not a multiple of eight, and more than one block
COUNT = SHAPE.numel()
SIGMAS = 5
"""One false alarm in two million."""


def drawn(p: float) -> torch.Tensor:
    return unpacked(keep_mask(*SHAPE, p, CPU), SHAPE[1])


def dropped(p: float) -> torch.Tensor:
    return ~drawn(p)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.25, 0.5, 0.502, 1 / 256, 0.0001, 1e-17, 0.999])
def test_the_share_that_is_dropped(p: float):
    torch.manual_seed(0)
    # and a few where p is so small that none is the rule
    spread = SIGMAS * math.sqrt(p * (1 - p) / COUNT) + 5 / COUNT * (p * COUNT < 1)
    for _ in range(3):
        assert abs(dropped(p).double().mean() - p) < spread


@pytest.mark.parametrize("p", [0.05, 0.1, 0.37, 0.5])
def test_rows_columns_and_neighbours_are_as_those_of_a_fair_draw(p: float):
    torch.manual_seed(1)
    drop = dropped(p).double()
    for dim, length in ((0, SHAPE[0]), (1, SHAPE[1])):
        z = (drop.mean(dim) - p) / math.sqrt(p * (1 - p) / length)
        assert z.abs().max() < SIGMAS
        assert abs(z.std() - 1) < 0.12
    # without padding bits, what shares the rest of p is 64 words apart, in all blocks but the last
    count = COUNT - COUNT % 8
    flat = (~unpacked(keep_mask(1, count, p, CPU), count)).double().flatten() - p
    for lag in (1, 2, 8, 64, SHAPE[1], 4096, 8192, 1 << 18):
        z = (flat[:-lag] * flat[lag:]).mean() / (p * (1 - p)) * math.sqrt(count - lag)
        assert abs(z) < SIGMAS


def test_two_draws_have_nothing_in_common():
    torch.manual_seed(2)
    p = 0.2
    one, two = dropped(p).double() - p, dropped(p).double() - p
    assert abs((one * two).mean() / (p * (1 - p)) * math.sqrt(COUNT)) < SIGMAS


def test_the_same_seed_gives_the_same_masks():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = [drawn(0.3) for _ in range(2)]
    torch.set_rng_state(state)
    second = [drawn(0.3) for _ in range(2)]
    assert all(map(torch.equal, first, second))
    assert not torch.equal(*first)


@pytest.mark.parametrize("shape", [(0, 0), (0, 8), (1, 1), (1, 7), (3, 0), (5, 64), (700, 1001)])
def test_any_shape(shape: tuple[int, int]):
    mask = keep_mask(*shape, 0.5, CPU)
    assert mask.numel() == shape[0] * -(-shape[1] // 8)  # a bit an element
    keep = unpacked(mask, shape[1])
    assert keep.shape == shape
    assert keep.dtype == torch.bool


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_kept_keeps_every_bit(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(50, 20).to(dtype).t()
    x[0, :3] = torch.tensor([math.inf, -0.0, math.nan])
    keep = unpacked(keep_mask(*x.shape, 0.4, CPU), x.shape[1])
    wanted = torch.where(keep, x, torch.zeros((), dtype=dtype)).contiguous().view(torch.uint8)
    result = masked(x, keep, out=torch.empty_like(x))
    assert torch.equal(result.contiguous().view(torch.uint8), wanted)
    assert masked(x, keep, out=x) is x
    assert torch.equal(x.contiguous().view(torch.uint8), wanted)


def test_on_other_devices_a_mask_is_made_there():
    x = torch.empty(3, 5, device="meta")
    keep = unpacked(keep_mask(3, 5, 0.1, x.device), 5)
    assert (keep.shape, keep.dtype, keep.device.type) == (x.shape, torch.bool, "meta")
    assert masked(x, keep, out=x) is x


def test_layers_of_a_group_and_adapters_of_a_layer_have_masks_of_their_own():
    x, one, zero = torch.ones(64, 64), torch.eye(64), torch.zeros(64, 64)
    updates = [Update(one, one, 1.0, 0.5) for _ in range(3)]
    y1, y2 = fused(x, [Layer(updates[:2], zero), Layer(updates[2:], zero)], torch.float32)
    # with A and B the identity, an output is the sum of the masks, each with the factor 1/(1-p)
    assert set(y1.flatten().tolist()) == {0.0, 2.0, 4.0}
    assert set(y2.flatten().tolist()) == {0.0, 2.0}
    assert not torch.equal(y1 > 2, y2 > 0)


def test_the_mean_of_many_draws_is_the_undropped_update():
    torch.manual_seed(4)
    x, a, b = torch.randn(4, 32), torch.randn(3, 32), torch.randn(5, 3)
    weight = torch.zeros(5, 32)
    mean = torch.stack(
        [fused(x, [Layer([Update(a, b, 1.0, 0.3)], weight)], torch.float32)[0] for _ in range(4000)]
    )
    spread = mean.std(0) / math.sqrt(len(mean))
    assert ((mean.mean(0) - x @ a.t() @ b.t()).abs() < SIGMAS * spread).all()
