"""What a tensor can be computed from again, read off autograd's own graph.

Whoever needs ``x`` in the backward pass usually keeps it. But where ``x`` is a product, say of a
gated MLP's two halves or of a norm's input and its scale, autograd keeps the factors anyway: then
``x`` costs nothing if it is multiplied out once more. The graph behind ``x`` says so for any
architecture, and the operations are the same ones on the same numbers, so the result is equal to
the last bit. Only cheap elementwise operations are followed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hf_lora.compat.torch_graph import (
    gelu_approximation,
    hooks_on_saved,
    result_of,
    saved_factors,
    saved_input,
)
from hf_lora.functional.scaled_rows import ScaledRows

_DEPTH = 6
"""How many operations are followed back; a norm has four."""

Expression = tuple[Any, ...]
"""("kept", i), or the name of an operation, its settings, and the expressions it works on."""


@dataclasses.dataclass(frozen=True)
class Recompute:
    """How to compute a tensor again from tensors that the graph keeps anyway."""

    expression: Expression
    """Hashable, and without sizes: equal for the same place in a model at every step."""

    kept: tuple[torch.Tensor, ...]


def recompute_of(x: torch.Tensor) -> Recompute | None:
    """Return how ``x`` can be computed again without keeping anything more, or None.

    None where the graph is not known to lead to kept tensors, where ``x`` was changed in place
    after it was computed, or where someone else (activation checkpointing, offloading of what is
    saved) decides what the graph keeps.
    """
    node = x.grad_fn
    if node is None or x.is_inference() or x._version or _others_keep():
        return None
    kept: list[torch.Tensor] = []
    try:
        expression = _follow(node, kept, _DEPTH)
    except (
        RuntimeError
    ):  # freed already, or changed in place since: autograd refuses to hand it out
        return None
    if expression is None or expression[0] == "kept":
        return None
    return Recompute(expression, tuple(kept))


def _others_keep() -> bool:
    """Say whether what is saved goes through hooks of activation checkpointing or the like.

    Hooks that hand every tensor back as it was (those that only count) are no hindrance.
    """
    hooks = hooks_on_saved()
    if hooks is None:
        return False
    pack, unpack = hooks
    probe = torch.empty(0)
    if pack.__module__.startswith("torch."):
        return True
    try:
        return unpack(pack(probe)) is not probe
    except Exception:  # a stranger's hook, which may refuse what is not its own
        return True


def _follow(node: Any, kept: list[torch.Tensor], depth: int) -> Expression | None:
    """Return the expression of the node's output; append to ``kept`` what it starts from."""
    rule = _RULES.get(node.name()) if depth else None
    return rule(node, kept, depth) if rule else None


def _keep(tensor: torch.Tensor, kept: list[torch.Tensor]) -> Expression:
    kept.append(tensor)
    return ("kept", len(kept) - 1)


def _operand(
    node: Any, saved: torch.Tensor | None, index: int, kept: list[torch.Tensor], depth: int
) -> Expression | None:
    """Return the expression of one operand: saved by the node itself, or followed further."""
    if saved is not None:
        return _keep(saved, kept)
    before = node.next_functions[index][0]
    return None if before is None else _follow(before, kept, depth - 1)


def _product(node: Any, kept: list[torch.Tensor], depth: int) -> Expression | None:
    first, second = saved_factors(node)
    left = _operand(node, first, 0, kept, depth)
    right = left and _operand(node, second, 1, kept, depth)
    return left and right and ("mul", left, right)


def _conversion(node: Any, kept: list[torch.Tensor], depth: int) -> Expression | None:
    inner = _operand(node, None, 0, kept, depth)
    return inner and ("to", result_of(node).dtype, inner)


def _reshaped(node: Any, kept: list[torch.Tensor], depth: int) -> Expression | None:
    """Follow a view that splits or joins leading dimensions, and leaves the last as it is."""
    before = node.next_functions[0][0]
    last = result_of(node).shape[-1:]
    if before is None or not last or result_of(before).shape[-1:] != last:
        return None
    return _follow(before, kept, depth - 1)


def _silu(node: Any, kept: list[torch.Tensor], depth: int) -> Expression:
    return ("silu", _keep(saved_input(node), kept))


def _gelu(node: Any, kept: list[torch.Tensor], depth: int) -> Expression:
    return ("gelu", gelu_approximation(node), _keep(saved_input(node), kept))


_RULES: dict[str, Callable[[Any, list[torch.Tensor], int], Expression | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _conversion,
    "ViewBackward0": _reshaped,
    "UnsafeViewBackward0": _reshaped,
    "SiluBackward0": _silu,
    "GeluBackward0": _gelu,
}


def recomputed(expression: Expression, kept: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute a tensor from what its recipe keeps; where a view was followed, in another shape."""
    match expression:
        case ("kept", index):
            return kept[index]
        case ("mul", left, right):
            return _multiplied(left, right, kept)
        case ("to", dtype, inner):
            return recomputed(inner, kept).to(dtype)
        case ("silu", inner):
            return F.silu(recomputed(inner, kept))
        case ("gelu", approximate, inner):
            return F.gelu(recomputed(inner, kept), approximate=approximate)
    raise AssertionError(expression)


def _multiplied(left: Expression, right: Expression, kept: Sequence[torch.Tensor]) -> torch.Tensor:
    """Multiply two expressions, into the memory of one that was just computed where that fits."""
    a, b = recomputed(left, kept), recomputed(right, kept)
    for own, other in ((a, b), (b, a)):
        if (
            not torch.is_grad_enabled()
            and own.dtype == torch.result_type(own, other)
            and own.shape == torch.broadcast_shapes(own.shape, other.shape)
            and not any(own is tensor for tensor in kept)
        ):
            return own.mul_(other)
    return torch.mul(a, b)


def recomputed_rows(
    expression: Expression, kept: Sequence[torch.Tensor], features: int, dtype: torch.dtype
) -> ScaledRows:
    """Compute a tensor as rows of ``dtype``, with scales of whole rows and columns left apart.

    In float16 nothing is left apart, as what a norm has not scaled yet may be too large for it.
    """
    if dtype != torch.float16:
        core, *scales = _peeled(expression, kept, features)
        if core is not None:
            core_NI = core.reshape(-1, features).to(dtype)
            return ScaledRows(core_NI, *scales)
    return ScaledRows(recomputed(expression, kept).reshape(-1, features).to(dtype))


def _peeled(
    expression: Expression, kept: Sequence[torch.Tensor], features: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return a kept tensor, a scale of its rows and one of its columns, whose product it is.

    The first is None where an expression is not such a product.
    """
    match expression:
        case ("kept", index) if kept[index].shape[-1:] == (features,) and kept[index].dim() > 1:
            return kept[index], None, None
        case ("to", _, inner):
            return _peeled(inner, kept, features)
        case ("mul", left, right):
            for inner, scale in ((left, right), (right, left)):
                if scale[0] != "kept":
                    continue
                by = kept[scale[1]]
                core, by_row, by_column = _peeled(inner, kept, features)
                if core is None:
                    continue
                if by.shape == (*core.shape[:-1], 1) and by_row is None:
                    return core, by.reshape(-1, 1), by_column
                if by.shape == (features,) and by_column is None:
                    return core, by_row, by
    return None, None, None
