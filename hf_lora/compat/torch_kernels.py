"""What hf_lora knows of PyTorch's kernels inside. Seen in 2.13."""

import functools

import torch

_CHECKS = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Say whether PyTorch has a fast product of 16-bit matrices on this machine's processor.

    Without one its products take five to fifty times what they take in float32: those of an update
    are computed in float32 then.
    """
    try:
        return bool(getattr(torch.ops.mkldnn, _CHECKS[dtype])())
    except AttributeError:  # a PyTorch without oneDNN has neither the product nor the check
        return False
