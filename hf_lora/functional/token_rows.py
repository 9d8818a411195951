"""Some rows of a matrix read as others, without a copy of it: looked up, and as columns of x Wᵀ.

Legend: N rows that are exchanged, D width, V rows of the matrix, ... any number of tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hf_lora.compat.torch_execution import in_transform


class NewRows(NamedTuple):
    """What one adapter has in the place of some rows."""

    values_ND: torch.Tensor
    sorted_N: torch.Tensor
    """The numbers of the rows, in ascending order."""

    order_N: torch.Tensor
    """Where in ``values_ND`` each of these is."""

    factor: float = 1.0
    """How much of the way from the old rows to these."""

    def ids_N(self) -> torch.Tensor:
        """Return the numbers of the rows, in the order of ``values_ND``."""
        return torch.empty_like(self.sorted_N).scatter(0, self.order_N, self.sorted_N)


def index_of(ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of rows in ascending order, and where each is in ``ids``."""
    given = torch.tensor(ids, dtype=torch.long)
    return torch.sort(given)


def looked_up(
    y: torch.Tensor, ids: torch.Tensor, new: Sequence[NewRows], padding: int | None, scale: Any
) -> torch.Tensor:
    """Return what looking ``ids`` up gives, with the new rows in the place of the old ones.

    Args:
        y: What the matrix gives, (..., D).
        ids: The numbers that were looked up, (...).
        new: The new rows. Where several have the same, their factors add up to 1.
        padding: A row that gets no gradient.
        scale: What the rows are multiplied by, or None.
    """
    base, whole = y, all(rows.factor == 1.0 for rows in new)
    for rows in new:
        at = torch.searchsorted(rows.sorted_N, ids.long()).clamp(max=len(rows.sorted_N) - 1)
        hit = (rows.sorted_N[at] == ids).unsqueeze(-1)
        values = F.embedding(rows.order_N[at], rows.values_ND).to(y.device, y.dtype)
        if padding is not None:
            values = torch.where((ids == padding).unsqueeze(-1), values.detach(), values)
        values = values if scale is None else values * as_scale(scale, values)
        if whole:
            y = torch.where(hit, values, y)
        else:
            y = y + torch.where(hit, (values - base) * rows.factor, 0.0).to(y.dtype)
    return y


def as_scale(scale: Any, rows: torch.Tensor) -> Any:
    """Return what rows are multiplied by, in their type."""
    return scale.to(rows.device, rows.dtype) if isinstance(scale, torch.Tensor) else scale


def with_columns(
    y: torch.Tensor,
    x: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    new: Sequence[NewRows],
) -> torch.Tensor:
    """Return ``x Wᵀ + b`` with the new rows of W in the place of the old ones.

    Where they are there in full, what comes out does not depend on the old ones, whose numbers may
    be random and others each time.

    Args:
        y: What the old matrix gives, (..., V); it may be written to.
        x: The input, (..., D).
        weight_VD: The old matrix, of which no gradient is wanted.
        bias_V: The bias.
        new: The new rows, as for :func:`looked_up`.
    """
    whole = all(rows.factor == 1.0 for rows in new)
    for rows in new:
        ids = rows.ids_N()
        old_ND = weight_VD.detach().index_select(0, ids)
        step_ND = ((rows.values_ND - old_ND) * rows.factor).to(x.dtype)
        if not whole:
            y = y.index_add(-1, ids, F.linear(x, step_ND).to(y.dtype))
            continue
        values_ND = rows.values_ND.to(old_ND.dtype).to(x.dtype)
        bias = None if bias_V is None else bias_V.detach().index_select(0, ids).to(x.dtype)
        if torch.compiler.is_compiling() or in_transform():
            y = y.index_copy(-1, ids, F.linear(x, values_ND, bias).to(y.dtype))
            continue
        columns = F.linear(x.detach(), values_ND.detach(), bias).to(y.dtype)
        if torch.is_grad_enabled() and (x.requires_grad or step_ND.requires_grad):
            step = F.linear(x, step_ND).to(y.dtype)
            y = _Columns.apply(y, step, columns, ids)  # type: ignore[assignment]
        else:
            y.index_copy_(-1, ids, columns)
    return y


class _Columns(torch.autograd.Function):
    """Columns put in the place of others, without a copy of what they are part of.

    The gradient goes back through the old columns as if they had stayed, and that through the step
    from them to the new ones is the rest. So no gradient of the size of y is copied either.
    """

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, step: torch.Tensor, columns: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(ids)
        return y.index_copy_(-1, ids, columns)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        return gradients[0], gradients[0].index_select(-1, ids), None, None
