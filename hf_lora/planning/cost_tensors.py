"""The tensors of a model that trains, as processes cut them: their shapes, bytes and blocks."""

import dataclasses
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.compat.deepspeed import shape_of
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.quantized import stored_bytes
from hf_lora.layers.roles import OWN_BIAS, Place
from hf_lora.layers.token_rows import ROWS
from hf_lora.layers.trained import tensor_names
from hf_lora.planning.records import Plan


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter of the base or of an adapter."""

    path: str
    """Of its module."""

    name: str
    """In its module; the role for an adapter's tensors."""

    shape: tuple[int, ...]
    """Of what is stored, which for a quantized weight may be another than the layer's."""

    bytes: int
    block: str | None
    """Path of the repeated block that it is in."""

    added: bool = False
    """Whether a target's adapter has it, and not the base or a copy of a module of it."""

    def part(self, world: int, dim: int | None = 0) -> int:
        """Return the bytes of the largest of ``world`` parts along a dimension; all without one."""
        if dim is None or dim >= len(self.shape) or not self.shape[dim]:
            return self.bytes
        length = self.shape[dim]
        return math.ceil(self.bytes * math.ceil(length / world) / length)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """All that a process would keep by itself."""

    base: tuple[Piece, ...]
    """Tied parameters once."""

    learning: tuple[Piece, ...]
    """Those of each target, and the copies of modules that are trained in full."""

    buffers: int
    """Bytes of such copies' buffers, which are whole in every process."""


def ring(size: float, world: int) -> int:
    """Return what a process sends if each has a share of ``size`` bytes, and all get everything."""
    return math.ceil(size * (world - 1) / world)


def pieces(model: nn.Module, plan: Plan, base: Iterable[tuple[str, torch.Tensor]]) -> Pieces:
    """Return the tensors of ``model`` and of what ``plan`` adds to it.

    Args:
        model: The model.
        plan: Its plan.
        base: The base's parameters, each once, by name.
    """
    blocks = set(_blocks(model))
    split = ((*name.rpartition("."), tensor) for name, tensor in base)
    return Pieces(
        base=tuple(_piece(path, name, tensor, blocks) for path, _, name, tensor in split),
        learning=(*_factors(plan, blocks), *_copies(model, plan, blocks), *_rows(plan, blocks)),
        buffers=sum(item.bytes - item.parameter_bytes for item in plan.trained),
    )


def _piece(path: str, name: str, tensor: torch.Tensor, blocks: set[str]) -> Piece:
    shape = () if is_lazy(tensor) else shape_of(tensor)
    return Piece(path, name, shape, stored_bytes(tensor), _block(path, blocks))


def _factors(plan: Plan, blocks: set[str]) -> Iterator[Piece]:
    for target in plan.targets:
        block = _block(target.path, blocks)
        for name, shape in target.shapes.items():
            size = math.prod(shape) * target.dtype.itemsize
            yield Piece(target.path, name, shape, size, block, added=True)


def _rows(plan: Plan, blocks: set[str]) -> Iterator[Piece]:
    for item in plan.rows:
        shape = len(item.ids), item.width
        yield Piece(item.path, ROWS, shape, item.bytes, _block(item.path, blocks), added=True)


def _copies(model: nn.Module, plan: Plan, blocks: set[str]) -> Iterator[Piece]:
    seen: set[Place] = set()
    for item in plan.trained:
        for below, module in model.get_submodule(item.path).named_modules(prefix=item.path):
            for name in tensor_names(module):
                tensor = parameter_of(module, name)
                first = plan.ties.get((below, name), (below, name))
                if tensor is not None and first not in seen:
                    seen.add(first)
                    yield _piece(below, name, tensor, blocks)
    for item in plan.biases:
        bias = parameter_of(model.get_submodule(item.path), OWN_BIAS)
        assert bias is not None
        yield _piece(item.path, OWN_BIAS, bias, blocks)


def _blocks(model: nn.Module) -> Iterator[str]:
    """Yield the paths of the repeated blocks, the units in which weights are put together."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for path, module in model.named_modules():
        inside = isinstance(module, nn.ModuleList) and not names
        if type(module).__name__.removeprefix("FSDP") in names:
            yield path
        elif inside:
            yield from (f"{path}.{name}" if path else name for name in module._modules)


def _block(path: str, blocks: set[str]) -> str | None:
    """Return the innermost block that a path is in."""
    while path:
        if path in blocks:
            return path
        path = path.rpartition(".")[0]
    return None
