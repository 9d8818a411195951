"""Masks: the right share, nothing in common, the same after the same seed."""

import math

import pytest
import torch

from hf_lora.functional.dropout import keep_mask, masked, masked_, widened
from hf_lora.functional.fused import Layer, Update, fused

CPU = torch.device("cpu")
SHAPE = torch.Size((1000, 1003))  # not a multiple of eight, and more than one block
COUNT = SHAPE.numel()
SIGMAS = 5
"""One false alarm in two million."""


def dropped(p: float) -> torch.Tensor:
    return keep_mask(SHAPE, p, CPU) == 0


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.502, 1 / 256, 0.0001, 0.999])
def test_the_share_that_is_dropped(p: float):
    torch.manual_seed(0)
    spread = SIGMAS * math.sqrt(p * (1 - p) / COUNT)
    for _ in range(3):
        assert abs(dropped(p).double().mean() - p) < spread


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_rows_columns_and_neighbours_are_as_those_of_a_fair_draw(p: float):
    torch.manual_seed(1)
    drop = dropped(p).double()
    for dim, length in ((0, SHAPE[0]), (1, SHAPE[1])):
        z = (drop.mean(dim) - p) / math.sqrt(p * (1 - p) / length)
        assert z.abs().max() < SIGMAS
        assert abs(z.std() - 1) < 0.12
    flat = drop.flatten() - p
    # 4096 apart are those that share a threshold, in all blocks but the last
    for lag in (1, 2, 8, SHAPE[1], 4096, 1 << 18):
        z = (flat[:-lag] * flat[lag:]).mean() / (p * (1 - p)) * math.sqrt(COUNT - lag)
        assert abs(z) < SIGMAS


def test_two_draws_have_nothing_in_common():
    torch.manual_seed(2)
    p = 0.2
    one, two = dropped(p).double() - p, dropped(p).double() - p
    assert abs((one * two).mean() / (p * (1 - p)) * math.sqrt(COUNT)) < SIGMAS


def test_the_same_seed_gives_the_same_masks():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = [keep_mask(SHAPE, 0.3, CPU) for _ in range(2)]
    torch.set_rng_state(state)
    second = [keep_mask(SHAPE, 0.3, CPU) for _ in range(2)]
    assert all(map(torch.equal, first, second))
    assert not torch.equal(*first)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 0), (2, 3, 5)])
def test_any_shape(shape: tuple[int, ...]):
    mask = keep_mask(torch.Size(shape), 0.5, CPU)
    assert mask.shape == shape
    assert set(mask.flatten().tolist()) <= {0, -1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_kept_keeps_every_bit(dtype: torch.dtype):
    x = torch.randn(50, 20).to(dtype).t()
    mask = keep_mask(x.shape, 0.4, CPU)
    wanted = torch.where(mask.bool(), x, torch.zeros((), dtype=dtype))
    wide = widened(mask, dtype)
    assert torch.equal(masked(x, wide), wanted)
    assert torch.equal(masked_(x.clone(), wide), wanted)


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
