"""The forwards that tensor parallelism puts on modules, by transformers and by PyTorch.

transformers' is a function on the instance that keeps what it needs in a closure, without a name
anywhere: the style, the mesh, and the forward that it found. Seen in transformers 5.24. One whose
closure has other names is of a style that is not known, and refused as such.
"""

import dataclasses
import types
from typing import Any, TypeGuard

from torch import nn

_LIBRARY = "transformers.distributed"
_INNER = "original_forward"
_NAMES = frozenset({"self", "mesh", "module", _INNER})

COLUMNS, ROWS = "ColwiseParallel", "RowwiseParallel"
"""transformers' classes of styles that split one weight, and call the forward with a part of it."""


@dataclasses.dataclass(frozen=True)
class ParallelForward:
    """What a forward of transformers' tensor parallelism says of itself."""

    style: str
    """transformers' word for how the module is split, such as ``"colwise"``."""

    kind: str | None
    """The name of the style's class, or None where the closure is not as it is known."""

    mesh: Any
    """The processes among which it is."""


def parallel_forward(module: nn.Module) -> ParallelForward | None:
    """Return what transformers' tensor parallelism says on a module, or None if it has none.

    Without it a split layer would be taken for a whole one, and its factors drawn too large.
    """
    forward = vars(module).get("forward")
    if not _is_theirs(forward):
        return None
    cells = _cells(forward)
    if cells is None:
        return ParallelForward(forward.__qualname__.split(".")[0], None, None)
    return ParallelForward(
        _style(forward, cells["self"]), type(cells["self"]).__name__, cells["mesh"]
    )


def split_by_torch(module: nn.Module) -> bool:
    """Say whether PyTorch's own ``parallelize_module`` has split a module. Seen in 2.13."""
    return bool(vars(module).get("_distribute_module_applied"))


def called_by(forward: Any) -> Any:
    """Return what a forward of tensor parallelism calls, or, if it is none, the forward itself."""
    cells = _cells(forward)
    return cells[_INNER] if cells and type(cells["self"]).__name__ in (COLUMNS, ROWS) else forward


def calling(forward: Any, module: nn.Module, method: Any) -> Any:
    """Return ``method``, inside what tensor parallelism does around it if ``forward`` does that.

    Without it the forward of a patched layer would never be asked: the one on the instance wins.
    """
    if called_by(forward) is forward:
        return method
    new = {_INNER: method, "module": module}
    names = forward.__code__.co_freevars
    closure = tuple(
        types.CellType(new[name]) if name in new else cell
        for name, cell in zip(names, forward.__closure__, strict=True)
    )
    code, name = forward.__code__, forward.__name__
    return types.FunctionType(code, forward.__globals__, name, forward.__defaults__, closure)


def _is_theirs(forward: Any) -> TypeGuard[types.FunctionType]:
    return isinstance(forward, types.FunctionType) and forward.__module__.startswith(_LIBRARY)


def _cells(forward: Any) -> dict[str, Any] | None:
    """Return what a forward of tensor parallelism has around it, by name, or None."""
    if not _is_theirs(forward):
        return None
    cells = zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True)
    found = {name: cell.cell_contents for name, cell in cells}
    return found if found.keys() >= _NAMES else None


def _style(forward: Any, style: Any) -> str:
    """Return the name under which transformers has registered a style, or its class's."""
    styles = forward.__globals__.get("ALL_PARALLEL_STYLES", {})
    return next((name for name in styles if styles[name] is style), type(style).__name__)
