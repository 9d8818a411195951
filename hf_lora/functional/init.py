"""How the two factors of an adapter start."""

import math

import torch
from torch import nn


@torch.no_grad()
def init_low_rank(a_RI: torch.Tensor, b_OR: torch.Tensor, method: str) -> None:
    """Fill A as ``method`` says and B with zeros, in place.

    ``"kaiming"``: uniform in ±1/sqrt(I), PyTorch's own start of a linear layer and PEFT's default.
    ``"gaussian"``: normal with deviation 1/R, as in the reference code of LoRA (arXiv 2106.09685).
    """
    if method == "gaussian":
        nn.init.normal_(a_RI, std=1 / a_RI.shape[0])
    else:
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))
    nn.init.zeros_(b_OR)
