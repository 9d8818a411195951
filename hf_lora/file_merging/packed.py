"""Weights that a checkpoint holds in 4 or 8 bits, and the numbers that they stand for.

What an adapter was trained on is these numbers. Read so, a quantized checkpoint is merged into as
any other, and the output has them in the type that they were computed in.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hf_lora.errors import AdapterFileError
from hf_lora.files.safe_json import parse_json
from hf_lora.files.safetensors_io import TensorFile

_STATE = ".quant_state.bitsandbytes__"
_MAPS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor that is held packed."""

    name: str
    shape: tuple[int, ...]
    """Of the numbers that it stands for."""

    dtype: torch.dtype
    """The type that they are computed in."""

    beside: tuple[str, ...]
    """The names of the tensors that only say how it is packed."""

    def numbers(self, file: TensorFile, begin: int, end: int) -> torch.Tensor:
        """Return the numbers from one place to another, flattened."""
        raise NotImplementedError


def packed_in(config: Mapping[str, Any], file: TensorFile) -> Iterator[Packed]:
    """Yield what a file of a checkpoint holds packed in a known way.

    Raises:
        AdapterFileError: It is damaged.
    """
    said = config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    if said is None:
        return
    kind = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
    for name, shape in file.shapes.items():
        stem = name.removesuffix("weight")
        if method == "bitsandbytes" and name.endswith(".weight"):
            state = next((n for n in file.shapes if n.startswith(f"{name}{_STATE}")), None)
            if state is not None:
                yield _four_bits(file, name, state)
            elif f"{stem}SCB" in file.shapes:
                beside = tuple(
                    n for n in (f"{stem}SCB", f"{stem}weight_format") if n in file.shapes
                )
                yield EightBits(name, shape, kind, beside)
        elif method == "fp8" and len(file.shapes.get(f"{name}_scale_inv", ())) == len(shape) == 2:
            yield _float8(name, shape, kind, file.shapes[f"{name}_scale_inv"], said)


@dataclasses.dataclass(frozen=True)
class FourBits(Packed):
    """bitsandbytes' NF4 or FP4: two numbers a byte, a scale for each block of them."""

    block: int
    nested: tuple[int, float] | None
    """Of scales that are themselves held in 8 bits: how many share one, and what is added."""

    def numbers(self, file: TensorFile, begin: int, end: int) -> torch.Tensor:
        """Return the numbers from one place to another, flattened."""
        first = begin // 2
        held = file.part(self.name, first, (end + 1) // 2)
        indices = torch.stack([held >> 4, held & 15], 1).view(-1).int()
        indices = indices[begin - 2 * first : end - 2 * first]
        table, scales = _tables(file, self)
        return (table[indices] * scales[torch.arange(begin, end) // self.block]).to(self.dtype)


@dataclasses.dataclass(frozen=True)
class EightBits(Packed):
    """bitsandbytes' LLM.int8: whole numbers, a scale for each row."""

    def numbers(self, file: TensorFile, begin: int, end: int) -> torch.Tensor:
        """Return the numbers from one place to another, flattened."""
        ((_, scales),) = file.read(self.beside[:1])
        rows = torch.arange(begin, end) // self.shape[-1]
        return (file.part(self.name, begin, end).float() * scales[rows] / 127).to(self.dtype)


@dataclasses.dataclass(frozen=True)
class Float8(Packed):
    """Numbers in float8, a scale for each rectangle of them."""

    block: tuple[int, int]
    """Rows and columns of such a rectangle."""

    def numbers(self, file: TensorFile, begin: int, end: int) -> torch.Tensor:
        """Return the numbers from one place to another, flattened."""
        ((_, scales),) = file.read(self.beside)
        at, columns = torch.arange(begin, end), self.shape[-1]
        rows = at // columns // self.block[0]
        scale = scales.float().reshape(scales.shape[0], -1)[rows, at % columns // self.block[1]]
        return (file.part(self.name, begin, end).float() * scale).to(self.dtype)


def _float8(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    grid: tuple[int, ...],
    said: Mapping[str, Any],
) -> Float8:
    block = said.get("weight_block_size")
    sides = (-(-size // count) for size, count in zip(shape, grid, strict=True))
    high, wide = block if isinstance(block, list) and len(block) == 2 else sides
    fits = [-(-size // side) for size, side in zip(shape, (high, wide), strict=True)]
    if fits != list(grid):
        raise AdapterFileError(f"{name}: {grid} scales are not one for each {high} x {wide}")
    return Float8(name, shape, dtype, (f"{name}_scale_inv",), (int(high), int(wide)))


def _four_bits(file: TensorFile, name: str, state: str) -> FourBits:
    ((_, text),) = file.read([state])
    said = parse_json(bytes(text.tolist()), f"{file.path}: {state}")
    beside = (state, *(f"{name}{each}" for each in _MAPS if f"{name}{each}" in file.shapes))
    shape, block, kind = said.get("shape"), said.get("blocksize"), str(said.get("dtype"))
    count = math.prod(file.shapes[name]) * 2
    if (
        not isinstance(shape, list)
        or not all(type(size) is int and size > 0 for size in shape)
        or not 0 <= count - math.prod(shape) < 2
        or type(block) is not int
        or block < 1
        or not isinstance(getattr(torch, kind, None), torch.dtype)
    ):
        raise AdapterFileError(f"{file.path}: {state} does not say how {name} is packed")
    nested = None
    if f"{name}.nested_absmax" in beside:
        nested = int(said["nested_blocksize"]), float(said["nested_offset"])
    return FourBits(name, tuple(shape), getattr(torch, kind), beside, block, nested)


@functools.lru_cache(1)
def _tables(file: TensorFile, packed: FourBits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 16 numbers, and the scale of each block."""
    held = dict(file.read(packed.beside[1:]))
    table, scales = held[f"{packed.name}.quant_map"], held[f"{packed.name}.absmax"]
    if packed.nested is not None:
        block, offset = packed.nested
        each = torch.arange(len(scales)) // block
        outer, codes = (held[f"{packed.name}.nested_{n}"] for n in ("absmax", "quant_map"))
        scales = codes[scales.int()] * outer[each] + offset
    return table.float(), scales.float()
