"""Layers whose parent uses their weight without calling them: an update there would not be heard.

Two classes of PyTorch do so by design, and their children are refused; so are the inner layers of
another library's adapter. Model code sometimes does in one branch (a fused kernel on a GPU) what it
does by a call in another; that is told.
"""

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from hf_lora.layers.names import LORA_A


def uncalled(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the path of every layer that is never called, or not in eval mode, to the reason."""
    found = {}
    for path, module in modules.items():
        forward = getattr(type(module), "forward", None)  # TorchScript's has none
        if forward is nn.MultiheadAttention.forward:
            reason = "nn.MultiheadAttention reads its weight without calling it"
            children = _below(module)
        elif forward is nn.TransformerEncoderLayer.forward:
            reason = (
                "nn.TransformerEncoderLayer reads its weight, and does not call it in eval mode"
            )
            children = ["linear1", "linear2"]
        elif LORA_A in module._modules:
            reason = "it is part of another library's adapter"
            children = _below(module)
        else:
            continue
        found.update((f"{path}.{child}".removeprefix("."), reason) for child in children)
    return found


def _below(module: nn.Module) -> list[str]:
    return [path for path, _ in module.named_modules() if path]


def reader_of(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """Return the class whose code reads a layer's weight without calling it, and its name there.

    Args:
        path: The layer's.
        modules: Path to module, for all of the model.
    """
    above, below = path, ""
    while above:
        above, _, name = above.rpartition(".")
        below = f"{name}.{below}" if below else name
        parent = type(modules[above])
        if below in weights_read_by(parent):
            return parent.__name__, below
    return None


@functools.cache
def weights_read_by(parent: type[nn.Module]) -> frozenset[str]:
    """Return what lies below and has its ``weight`` read by the class's forward, by dotted paths.

    As far as the source of what its forward calls says. Reading a property of it
    (``self.wo.weight.dtype``) or asking for its type does not count.
    """
    methods: dict[str, list[types.FunctionType]] = {}
    for cls in parent.__mro__:
        for name, value in vars(cls).items() if issubclass(cls, nn.Module) else ():
            if isinstance(value, types.FunctionType):
                methods.setdefault(name, []).append(inspect.unwrap(value))  # type: ignore[arg-type]
    # what only fills, prunes or fuses weights is not part of a forward
    reached, left = {"forward"}, ["forward"]
    names: set[str] = set()
    while left:
        for function in methods.get(left.pop(), ()):
            spoken = _names(function.__code__)
            new = (spoken & methods.keys()) - reached
            reached |= new
            left += new
            if "weight" in spoken:
                names.update(_reads(function))
    return frozenset(names)


def _names(code: types.CodeType) -> set[str]:
    """Return the names that a function's code speaks of, also in functions inside of it."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _reads(function: Callable) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # made at run time, or its source is not here
        return
    harmless = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            harmless.add(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in _QUESTIONS:
            harmless.update(node.args)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="weight", ctx=ast.Load(), value=owner) if node not in harmless:
                path = ast.unparse(owner)
                if path.startswith("self."):
                    yield path.removeprefix("self.")


_FACTS = {"dtype", "device", "shape", "ndim", "size", "numel", "requires_grad", "is_meta"}
_QUESTIONS = {"isinstance", "getattr", "hasattr", "id", "type"}
