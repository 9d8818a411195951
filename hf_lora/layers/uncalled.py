"""Layers whose parent uses their weight without calling them: an update there would not be heard.

PyTorch's attention does so by design, and its last layer is adapted only together with it; refused
are the inner layers of another library's adapter. Model code sometimes does in one branch (a fused
kernel on a GPU) what it does by a call in another; that is told.
"""

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from torch import nn

from hf_lora.layers.names import LORA_A
from hf_lora.layers.probe import is_plain
from hf_lora.layers.reading import Read, is_attention, out_projections, read_of


def uncalled(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the path of every layer that is never called, or not in eval mode, to the reason."""
    found = {}
    for path, module in modules.items():
        if is_attention(module):
            own = path.rpartition(".")[2] or "the model itself"
            reason = (
                "nn.MultiheadAttention reads its weight without calling it; name the attention "
                f"({own}), of which all weights are adapted"
            )
            children = _below(module)
        elif isinstance(module, nn.TransformerEncoderLayer):
            reason = (
                "nn.TransformerEncoderLayer reads its weight, which is packed or quantized, and "
                "does not call it in eval mode"
            )
            children = [c for c in ("linear1", "linear2") if not is_plain(module._modules[c])]  # type: ignore[arg-type]
        elif LORA_A in module._modules:
            reason = "it is part of another library's adapter"
            children = _below(module)
        else:
            continue
        found.update((f"{path}.{child}".removeprefix("."), reason) for child in children)
    return found


def unheard(paths: Collection[str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return those of :func:`uncalled` where an update would have no effect beside these layers'.

    Args:
        paths: The layers that are to be adapted together.
        modules: Path to module, for all of the model.
    """
    heard = {out for out, above in out_projections(paths, modules).items() if above in paths}
    return {path: reason for path, reason in uncalled(modules).items() if path not in heard}


def _below(module: nn.Module) -> list[str]:
    return [path for path, _ in module.named_modules() if path]


def kept_past(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Return the id of each module that one above it keeps in a plain attribute, to that one.

    A list of Python's own, say. A library that puts a wrapper in the place of a layer does not
    reach what is called from there; a layer that is patched in place is.
    """
    found: dict[int, str] = {}
    usual = vars(nn.Module()).keys()  # what every module has, its children among it
    for module in modules.values():
        for name, value in vars(module).items():
            if name in usual:
                continue
            many = value.values() if isinstance(value, dict) else value
            kept = many if isinstance(value, (list, tuple, dict)) and value else (value,)
            for each in kept:
                if isinstance(each, nn.Module):
                    found[id(each)] = type(module).__name__
    return found


def reason_kept_past(name: str) -> str:
    """Return what is wrong with an update where a module of that class keeps the layer so."""
    return f"{name} keeps it in a plain attribute as well, where PEFT's adapters are not called"


def reader_of(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """Return the class whose code reads a layer's weight without calling it, and its name there.

    Args:
        path: The layer's.
        modules: Path to module, for all of the model.
    """
    above, below = path, ""
    if read_of(path, modules) is not Read.NO:
        return None  # what is read there has the update in it
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
            value = value.__func__ if isinstance(value, staticmethod) else value
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
            names.update(_own(_weights_read(function)))
            readers = _readers(function, methods)
            for called, given in _calls(function) if readers else ():
                for reader in readers.get(called, ()):
                    names.update(_own(_read_of(reader, given)))
    return frozenset(names)


def _readers(
    function: types.FunctionType, methods: Mapping[str, list[types.FunctionType]]
) -> dict[str, list[types.FunctionType]]:
    """Return those that a function may call and that read a weight, by how they are called."""
    found: dict[str, list[types.FunctionType]] = {}
    for name in _names(function.__code__):
        known = function.__globals__.get(name)
        here = [(f"self.{name}", method) for method in methods.get(name, ())]
        here += [(name, known)] if isinstance(known, types.FunctionType) else []
        for called, each in here:
            if "weight" in _names(each.__code__):
                found.setdefault(called, []).append(each)
    return found


def _own(paths: Iterable[str]) -> Iterator[str]:
    """Yield the paths of what is a module's own, below it."""
    return (path.removeprefix("self.") for path in paths if path.startswith("self."))


def _read_of(function: types.FunctionType, given: ast.Call) -> Iterator[str]:
    """Yield which arguments of a call have their weight read by the function that gets them."""
    names = [*inspect.signature(function).parameters]
    if names[:1] == ["self"]:
        names = names[1:]
    arguments = dict(zip(names, given.args, strict=False))
    arguments |= {each.arg: each.value for each in given.keywords if each.arg}
    read = set(_weights_read(function))
    for name, value in arguments.items():
        if name in read:
            yield ast.unparse(value)


def _names(code: types.CodeType) -> set[str]:
    """Return the names that a function's code speaks of, also in functions inside of it."""
    inner = (each for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


@functools.cache
def _tree(function: Callable) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # made at run time, or its source is not here
        return ast.Module([], [])


def _calls(function: Callable) -> Iterator[tuple[str, ast.Call]]:
    """Yield the calls in a function, by what they call."""
    for node in ast.walk(_tree(function)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _weights_read(function: Callable) -> Iterator[str]:
    """Yield everything whose ``weight`` a function reads, as it is written there."""
    if "weight" not in _names(function.__code__):
        return
    tree = _tree(function)
    harmless = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            harmless.add(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in _QUESTIONS:
            harmless.update(node.args)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="weight", ctx=ast.Load(), value=owner) if node not in harmless:
                yield ast.unparse(owner)


_FACTS = {"dtype", "device", "shape", "ndim", "size", "numel", "requires_grad", "is_meta"}
_QUESTIONS = {"isinstance", "getattr", "hasattr", "id", "type"}
