"""bitsandbytes' private parts that hf_lora reads: each is there, and means what it is taken for."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from hf_lora.compat import bitsandbytes as compat

POSITIONS = torch.tensor([0, 1, 63, 64, 700, 4095])


def four_bit(**options: object) -> nn.Module:
    return nn.Sequential(bnb.nn.Linear4bit(64, 64, **options)).to("cpu")[0]  # type: ignore[arg-type]


def eight_bit() -> nn.Module:
    return nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)).to("cpu")[0]


def test_support_avx512bf16_for_cpu_is_the_flag_that_packs_for_inference():
    layer = four_bit()
    assert layer.support_avx512bf16_for_cpu in (True, False)
    layer.support_avx512bf16_for_cpu = True
    changed = compat.keep_gradients(nn.Sequential(layer))
    assert not layer.support_avx512bf16_for_cpu
    compat.restore_packing(changed)
    assert layer.support_avx512bf16_for_cpu


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_quant_state_has_code_absmax_blocksize_and_what_is_nested(quant_type: str, nested: bool):
    layer = four_bit(quant_type=quant_type, compress_statistics=nested)
    weight = layer.weight
    assert compat.is_four_bit(weight)
    assert compat.shape_of(weight) == (64, 64)
    whole = compat.four_bit(weight)
    assert whole is not None
    picked = compat.four_bit_values(weight, POSITIONS)
    assert torch.equal(picked, whole.reshape(-1)[POSITIONS])  # type: ignore[arg-type]


def test_scb_is_the_scale_of_a_row_on_the_weight_or_in_the_state():
    layer = eight_bit()
    assert compat.is_eight_bit(layer.weight)
    before = compat.eight_bit(layer)
    layer(torch.zeros(1, 64))  # moves the scales
    after = compat.eight_bit(layer)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    picked = compat.eight_bit_values(layer, POSITIONS)
    assert torch.equal(picked, after.reshape(-1)[POSITIONS])  # type: ignore[arg-type]


def test_plain_weights_are_neither():
    weight = nn.Linear(2, 2).weight
    assert not compat.is_four_bit(weight)
    assert not compat.is_eight_bit(weight)
    assert compat.shape_of(weight) is None


def test_a_view_has_its_own_of_what_a_forward_writes_to():
    layer = four_bit()
    view = nn.Module()
    vars(view).update(vars(layer), _parameters=dict(layer._parameters))
    compat.own_state(view)
    assert view._parameters["weight"] is not layer.weight
    assert view._parameters["weight"].quant_state is layer.weight.quant_state  # type: ignore[union-attr]
