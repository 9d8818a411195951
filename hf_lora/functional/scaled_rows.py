"""The input of a layer as rows, with what it was scaled by still apart.

What a norm gives is ``by_row * core * by_column``. Multiplied out, that takes several passes over
all of x; but LoRA's products have a narrow side, and there the same factors cost next to nothing:
``x Aᵀ = by_row * (core (by_column * A)ᵀ)``. The sums are those of x to within rounding.
"""

from typing import NamedTuple

import torch


class ScaledRows(NamedTuple):
    """``x = by_row * core * by_column``; N rows, I features."""

    core_NI: torch.Tensor
    by_row_N1: torch.Tensor | None = None
    by_column_I: torch.Tensor | None = None

    def times(self, a_QI: torch.Tensor) -> torch.Tensor:
        """Return ``x Aᵀ``, (N, Q), in A's type."""
        narrow_QI = _scaled(a_QI, self.by_column_I)
        return _scaled(torch.mm(self.core_NI, narrow_QI.t()), self.by_row_N1)

    def under(self, dh_NQ: torch.Tensor) -> torch.Tensor:
        """Return ``dhᵀ x``, (Q, I), in dh's type."""
        narrow_NQ = _scaled(dh_NQ, self.by_row_N1)
        return _scaled(torch.mm(narrow_NQ.t(), self.core_NI), self.by_column_I)


def _scaled(narrow: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return narrow if scale is None else torch.mul(narrow, scale).to(narrow.dtype)
