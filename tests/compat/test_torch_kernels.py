"""What PyTorch says of its 16-bit products on this processor: it answers, and is believed."""

import pytest
import torch

from hf_lora.compat import torch_kernels
from hf_lora.compat.torch_kernels import has_products

BOTH = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _asked_anew():
    has_products.cache_clear()
    yield
    has_products.cache_clear()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN")
@pytest.mark.parametrize("dtype", BOTH)
def test_pytorch_has_the_check(dtype: torch.dtype):
    name = torch_kernels._CHECKS[dtype]
    assert hasattr(torch.ops.mkldnn, name), f"torch.ops.mkldnn.{name}"
    assert has_products(dtype) is getattr(torch.ops.mkldnn, name)()


@pytest.mark.parametrize("dtype", BOTH)
def test_a_pytorch_without_the_check_has_no_such_products(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch_kernels, "_CHECKS", dict.fromkeys(BOTH, "_is_no_such_thing"))
    assert not has_products(dtype)
