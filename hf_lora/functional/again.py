"""The backward pass once more, in operations that can be differentiated again.

A gradient penalty or a product with the Hessian differentiates what a backward pass computed. The
one in :mod:`hf_lora.functional.passes` works in place and on copies; this one states the same
formulas on the tensors of the graph, and PyTorch does the rest.

Legend: N rows of input, I input features, O output features, R rank.
"""

from collections.abc import Sequence

import torch

from hf_lora.functional.dropout import unpacked
from hf_lora.functional.passes import Gradients
from hf_lora.functional.spec import OptionalTensors, Spec, Tensors


def differentiable_backward(
    spec: Spec,
    dys: OptionalTensors,
    weights: OptionalTensors,
    factors: Tensors,
    masks: Tensors,
    x_NI: torch.Tensor,
    wanted: tuple[bool, Sequence[bool], Sequence[bool]],
) -> Gradients:
    """Return the gradients of x, of the A's and of the B's, as functions of all that is given.

    Args:
        spec: What the forward pass did.
        dys: The gradient of each layer's output, or None.
        weights: Each layer's weight, or None where its own output was given.
        factors: All A's and all B's, as the graph has them.
        masks: What dropout kept of x, for each update with dropout.
        x_NI: The input as rows.
        wanted: Whether the gradients of x, of each A, and of each B are wanted.
    """
    x_wanted, a_wanted, b_wanted = wanted
    count = len(spec.updates)
    a, b = factors[:count], factors[count:]
    keep = dict(zip(spec.apart, masks, strict=True))
    dx: list[torch.Tensor] = []
    da: list[torch.Tensor | None] = [None] * count
    db: list[torch.Tensor | None] = [None] * count
    for dy, weight_OI, numbers in zip(dys, weights, spec.numbers, strict=True):
        if dy is None:
            continue
        dy_NO = spec.rows(dy)
        if x_wanted and weight_OI is not None:
            dx.append(dy_NO @ weight_OI)
        dy_NO = dy_NO.to(spec.update_dtype)
        for i in numbers:
            a_RI, b_OR = (factor.to(spec.update_dtype) for factor in (a[i], b[i]))
            a_RI = a_RI * spec.strengths[i]
            mask_NI = unpacked(keep[i], x_NI.shape[1]).to(spec.dtype) if i in keep else None
            seen_NI = (x_NI if mask_NI is None else x_NI * mask_NI).to(spec.update_dtype)
            dh_NR = dy_NO @ b_OR
            if a_wanted[i]:
                da[i] = ((dh_NR.t() @ seen_NI) * spec.strengths[i]).to(a[i].dtype)
            if b_wanted[i]:
                db[i] = (dy_NO.t() @ (seen_NI @ a_RI.t())).to(b[i].dtype)
            if x_wanted:
                part_NI = (dh_NR @ a_RI).to(spec.dtype)
                dx.append(part_NI if mask_NI is None else part_NI * mask_NI)
    return Gradients(torch.stack(dx).sum(0) if dx else None, da, db)
