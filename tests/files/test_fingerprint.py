"""What a fingerprint records of a tensor, and when two count as the same."""

import json
import math

import pytest
import torch

from hf_lora.files.fingerprint import Sample, difference, from_json, positions, to_json

SHAPES = [(4096, 4096), (32000, 2048), (11008, 4096), (8, 14336, 4096), (64, 64), (1000, 7)]


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)[torch.tensor(positions(tuple(tensor.shape)), dtype=torch.long)]


@pytest.mark.parametrize("shape", [*SHAPES, (), (1,), (5,), (15,), (17,), (0,), (3, 0), (2, 2)])
def test_positions_lie_inside_and_are_as_many_as_there_can_be(shape: tuple[int, ...]):
    at = positions(shape)
    assert len(at) == min(math.prod(shape), 16)
    assert all(0 <= place < math.prod(shape) for place in at)


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_meet_many_rows_and_many_columns(shape: tuple[int, ...]):
    """A step that divides a row would meet one column only, and miss what changed in the others."""
    at, width = list(positions(shape)), shape[-1]
    assert len({place // width for place in at}) == 16
    assert len({place % width for place in at}) >= min(width, 12)
    columns = sorted(place % width for place in at)
    gaps = [b - a for a, b in zip(columns, [*columns[1:], columns[0] + width], strict=True)]
    assert max(gaps) <= width / 3
    assert max(at) >= 0.8 * math.prod(shape)


def test_what_is_written_is_read():
    samples = {
        "a.weight": Sample((40, 3), torch.randn(16)),
        "b": Sample((3,), torch.tensor([torch.inf, torch.nan, -0.0]), quantized=True),
        "c": Sample((7, 7), None),
        "scalar": Sample((), torch.randn(1)),
    }
    content = to_json(samples, {"d": "a.weight"}, 40)
    assert content["quantized"] is True
    found = from_json(json.loads(json.dumps(content)))
    assert found is not None
    assert (found.ties, found.vocabulary, found.damaged) == ({"d": "a.weight"}, 40, ())
    for name, sample in samples.items():
        read = found.samples[name]
        assert (read.shape, read.quantized) == (sample.shape, sample.quantized)
        if sample.values is None:
            assert read.values is None
        else:
            torch.testing.assert_close(read.values, sample.values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-6, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_sixteen_bits_is_the_same(dtype: torch.dtype, scale: float):
    then = torch.randn(400, 16) * scale
    for row, rounded in zip(then, then.to(dtype).float(), strict=True):
        assert difference(row, rounded, False) is None
        assert difference(rounded, row, False) is None


@pytest.mark.parametrize("share", [0.02, 0.1, 1.0])
def test_a_few_percent_are_a_difference(share: float):
    then = torch.randn(16)
    assert difference(then, then * (1 + share), False) is not None
    assert difference(torch.zeros(16), torch.full((16,), share), False) is not None


def test_numbers_that_are_not_finite_must_stand_in_the_same_places():
    masked = torch.tensor([0.5, -torch.inf, torch.nan, 2.0])
    assert difference(masked, masked.clone(), False) is None
    for other in ([0.5, torch.inf, torch.nan, 2.0], [0.5, -torch.inf, 1.0, 2.0], [0.5, 1, 1, 2.0]):
        assert difference(masked, torch.tensor(other), False) is not None
        assert difference(torch.tensor(other), masked, False) is not None
