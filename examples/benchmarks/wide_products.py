"""Products of bfloat16 matrices in float32, rounded once: for processors without such products.

A processor with instructions for them, or a GPU, multiplies numbers of bfloat16 exactly, sums in
float32 and rounds what comes out once. So does PyTorch on a processor without, but in ten times the
time that float32 takes. With :func:`install`, matrices are widened and multiplied in float32 there:
the same arithmetic in another order of sums (of a product of 512 x 576 by 576 x 576, one number in
7,000 is rounded to the other side). It is for studies of rounding, not for measuring time.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

_PRODUCTS = ("mm", "mm.out", "addmm", "addmm.out", "addmm_", "bmm")
_installed: list[torch.library.Library] = []


def install() -> None:
    """Replace PyTorch's own products of bfloat16 in this process, where they are slow."""
    if _installed or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    library = torch.library.Library("aten", "IMPL")
    _installed.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a kernel already
        for name in _PRODUCTS:
            library.impl(name, _widened(name), "CPU")


def now() -> str:
    """Return how bfloat16 is multiplied in this process: ``"own"`` or ``"widened"``."""
    return "widened" if _installed else "own"


def _widened(name: str) -> Callable[..., torch.Tensor]:
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
    plain = torch.library.get_kernel(f"aten::{name.rstrip('_').removesuffix('.out')}", "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def product(*given: torch.Tensor, out: torch.Tensor | None = None, **scales: Any):
        if given[-1].dtype != torch.bfloat16:
            into = {} if out is None else {"out": out}
            return kernel.call_boxed(keys, *given, **into, **scales)
        wide = plain.call_boxed(keys, *(each.float() for each in given), **scales)
        if name.endswith("_"):
            return given[0].copy_(wide)
        return wide.to(torch.bfloat16) if out is None else out.copy_(wide)

    return product
