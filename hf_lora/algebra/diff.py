"""``diff``: in what two adapters, or two checkpoints, differ."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lora.algebra.layers import read_term
from hf_lora.algebra.pair import open_checkpoint
from hf_lora.algebra.sources import Adapter, Source, opened
from hf_lora.errors import AdapterFileError
from hf_lora.file_merging.checkpoint import CONFIG, Checkpoint
from hf_lora.files.read import AdapterFolder, is_adapter_folder
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.functional.decompose import inner, spaces
from hf_lora.functional.low_rank import Product
from hf_lora.hub.download import locate
from hf_lora.model.registry import registry_of
from hf_lora.text import printable, show, some

_BLOCK = 2**22
"""Numbers of a tensor that are in memory at a time."""

_MOST = 20


@dataclasses.dataclass(frozen=True)
class Difference:
    """One thing that both have: a layer's update, or a tensor."""

    name: str
    kind: str
    """``update`` of a layer, or ``tensor``."""

    equal: bool
    """Whether it is the same to the byte: type, shape and numbers."""

    norms: tuple[float, float]
    """Frobenius norms."""

    cosine: float | None
    """Of the angle between the two; None where one is zero or the shapes differ."""

    distance: float | None
    """Norm of the difference over that of the first; None where that is zero or shapes differ."""

    what: str = ""
    """What else differs: types, shapes, ranks."""


@dataclasses.dataclass(frozen=True)
class Diff:
    """In what two adapters or two checkpoints differ; ``print`` shows it."""

    kind: str
    """``adapters`` or ``checkpoints``."""

    one: str
    other: str
    config: Mapping[str, tuple[Any, Any]]
    """Field of the configuration to what each says; None where it says nothing."""

    only_in_one: tuple[str, ...]
    only_in_other: tuple[str, ...]
    compared: tuple[Difference, ...]

    @property
    def changed(self) -> list[Difference]:
        """What both have and is not the same to the byte."""
        return [each for each in self.compared if not each.equal]

    @property
    def equal(self) -> bool:
        """Whether they differ in nothing."""
        return not (self.config or self.only_in_one or self.only_in_other or self.changed)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**_plain(dataclasses.asdict(self)), "equal": self.equal}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return it as JSON, and write it to a file if one is named."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text)
        return text

    def __str__(self) -> str:
        return printable("\n".join(self._lines()), longest=None)

    def _lines(self) -> Iterator[str]:
        yield f"one: {self.one}"
        yield f"other: {self.other}"
        if self.equal:
            yield f"these {self.kind} are the same: {len(self.compared)} compared, to the byte"
            return
        for field, (there, here) in self.config.items():
            yield f"  {field}: {show(there)} -> {show(here)}"
        for where, names in (("one", self.only_in_one), ("other", self.only_in_other)):
            if names:
                yield f"  only in {where} ({len(names)}): {some(names)}"
        changed = self.changed
        same = len(self.compared) - len(changed)
        yield f"  {same} of {len(self.compared)} are equal to the byte"
        if not changed:
            return
        rows = [("distance", "cosine", "norms", "")]
        ranked = sorted(changed, key=lambda each: -(each.distance or math.inf))
        for each in ranked[:_MOST]:
            norms = "{:.4g} -> {:.4g}".format(*each.norms)
            what = f"{each.name}{f' ({each.what})' if each.what else ''}"
            rows.append((_number(each.distance), _number(each.cosine), norms, what))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        for row in rows:
            yield "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        if len(ranked) > _MOST:
            yield f"  and {len(ranked) - _MOST} more"


def diff(
    one: Source,
    other: Source,
    *,
    model: nn.Module | None = None,
    revision: tuple[str | None, str | None] = (None, None),
    token: str | bool | None = None,
) -> Diff:
    """Compare two adapters, or two checkpoints of models, without loading a model.

    Of adapters: the configurations; the update of each layer, by norms, cosine and distance, so
    that two factorings of one update are no distance apart; and every other tensor. Of checkpoints:
    the configurations and every tensor, a block at a time, whatever files they are in.

    Args:
        one: Folder, id on the Hub or, with ``model``, name of an adapter.
        other: Likewise, of the same kind.
        model: A wrapped model, some of whose adapters are named.
        revision: Branches, tags or commits of the two on the Hub.
        token: For private repos.

    Returns:
        In what they differ.

    Raises:
        AdapterFileError: One is an adapter and the other is not, or one is not sound.
        BaseLoadError, HubError: A checkpoint cannot be read, or the Hub cannot be reached.
    """
    names = (os.fspath(one), os.fspath(other))
    held = set() if model is None else set(registry_of(model).adapters)
    found: list[Source | Checkpoint] = [
        each if each in held else _found(each, at, token)
        for each, at in zip((one, other), revision, strict=True)
    ]
    first, second = found
    if isinstance(first, Checkpoint) and isinstance(second, Checkpoint):
        return _checkpoints(names, first, second)
    if isinstance(first, Checkpoint) or isinstance(second, Checkpoint):
        which = names[isinstance(first, Checkpoint)]
        raise AdapterFileError(
            f"{which} is an adapter and the other is a model: only two of a kind are compared"
        )
    with opened([(first, 1.0), (second, 1.0)], model=model, token=token) as pair:
        return _adapters(names, *pair)


def _found(source: Source, revision: str | None, token: str | bool | None) -> Path | Checkpoint:
    """Return the folder of an adapter, or a checkpoint."""
    if isinstance(source, os.PathLike) or os.path.exists(source):
        folder = Path(source)
        is_model = os.path.isfile(folder / CONFIG) and not is_adapter_folder(folder)
        return Checkpoint(folder) if is_model else folder
    try:
        return locate(source, revision=revision, token=token)
    except AdapterFileError:
        return open_checkpoint(source, revision, token)


def _adapters(names: tuple[str, str], one: Adapter, other: Adapter) -> Diff:
    first, second = one.folder, other.folder
    layers = [f for f in first.factors if f in second.factors]
    compared = [_layer(one, other, path) for path in layers]
    beside = [{**folder.others, **_rows(folder)} for folder in (first, second)]
    for name in beside[0].keys() & beside[1].keys():
        pair = [
            tensor
            for folder, keys in zip((first, second), beside, strict=True)
            for _, tensor in folder.file.read([keys[name]])
        ]
        compared.append(_tensors(name, [pair], pair[0], pair[1]))
    held = [{*folder.factors, *keys} for folder, keys in zip((first, second), beside, strict=True)]
    return Diff(
        "adapters",
        *names,
        _config(first.fields, second.fields),
        tuple(sorted(held[0] - held[1])),
        tuple(sorted(held[1] - held[0])),
        tuple(sorted(compared, key=lambda each: (each.kind != "update", each.name))),
    )


def _rows(folder: AdapterFolder) -> dict[str, str]:
    return {f"rows of {path}": each.key for path, each in folder.rows.items()}


def _layer(one: Adapter, other: Adapter, path: str) -> Difference:
    """Compare what two adapters do to a layer, and their tensors there."""
    terms = read_term(one, path), read_term(other, path)
    roles = [term.tensors.keys() for term in terms]
    equal = terms[0].config == terms[1].config and roles[0] == roles[1]
    equal = equal and all(_same(terms[0].tensors[r], terms[1].tensors[r]) for r in roles[0])
    slots = [(term.config.r, term.config.alpha) for term in terms]
    what = "" if slots[0] == slots[1] else "r, alpha: {} -> {}".format(*slots)
    if any(term.held.layout.split is None for term in terms):
        norms = [term.held.layout.norm(term.tensors, term.config) for term in terms]
        return Difference(path, "update", equal, (norms[0], norms[1]), None, None, what)
    parts = [
        {n: Product(p.left.double() * t.strength, p.right) for n, p in t.products().items()}
        for t in terms
    ]
    squares = [math.fsum(inner(p, p) for p in each.values()) for each in parts]
    try:
        both = math.fsum(inner(parts[0][n], parts[1][n]) for n in parts[0] if n in parts[1])
        apart = math.fsum(
            _apart(parts[0].get(n), parts[1].get(n)) for n in {**parts[0], **parts[1]}
        )
    except RuntimeError:  # layers of other sizes under one name
        shapes = [term.held.layout.sizes(term.held.shapes) for term in terms]
        what = "sizes: {} -> {}".format(*shapes)
        both = apart = None
    return _difference(path, "update", equal, squares, both, apart, what)


def _apart(one: Product | None, other: Product | None) -> float:
    """Return the squared norm of the difference of two updates."""
    if one is None or other is None:
        only = other if one is None else one
        assert only is not None
        return inner(only, only)
    left = torch.cat([one.left, -other.left], 2)
    whole = spaces([Product(left, torch.cat([one.right.double(), other.right.double()], 1))])
    return float(whole.cores[0].square().sum())


def _checkpoints(names: tuple[str, str], one: Checkpoint, other: Checkpoint) -> Diff:
    there, here = one.where.keys(), other.where.keys()
    compared = []
    for shard, table in one.tables.items():
        with one.opened(shard) as file, contextlib.ExitStack() as stack:
            files: dict[str, TensorFile] = {}
            for name in table.shapes:
                if name not in here:
                    continue
                where = other.where[name]
                if where not in files:
                    files[where] = stack.enter_context(other.opened(where))
                compared.append(_stored(name, (one, file), (other, files[where])))
    return Diff(
        "checkpoints",
        *names,
        _config(one.config, other.config),
        tuple(sorted(there - here)),
        tuple(sorted(here - there)),
        tuple(compared),
    )


def _stored(
    name: str, one: tuple[Checkpoint, TensorFile], other: tuple[Checkpoint, TensorFile]
) -> Difference:
    shapes = [checkpoint.shape(name) for checkpoint, _ in (one, other)]
    blank = [
        torch.empty(0, dtype=checkpoint.dtype(name)).expand(0) for checkpoint, _ in (one, other)
    ]
    counts = [math.prod(shape) for shape in shapes]

    def blocks() -> Iterator[list[torch.Tensor]]:
        for begin in range(0, max(counts), _BLOCK):
            yield [
                checkpoint.numbers(file, name, min(begin, n), min(begin + _BLOCK, n))
                for (checkpoint, file), n in zip((one, other), counts, strict=True)
            ]

    return _tensors(name, blocks(), *blank, shapes=shapes)


def _tensors(
    name: str,
    blocks: Iterable[Sequence[torch.Tensor]],
    one: torch.Tensor,
    other: torch.Tensor,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> Difference:
    """Compare two tensors, block by block."""
    sizes = shapes or [tuple(one.shape), tuple(other.shape)]
    alike = sizes[0] == sizes[1]
    equal = alike and one.dtype == other.dtype
    squares, both, apart = [0.0, 0.0], 0.0, 0.0
    for first, second in blocks:
        equal = equal and _same(first, second)
        a, b = first.reshape(-1).double(), second.reshape(-1).double()
        squares = [squares[0] + float(a @ a), squares[1] + float(b @ b)]
        if alike:
            both += float(a @ b)
            apart += float((a - b).square().sum())
    what = [] if alike else ["shape {} -> {}".format(*sizes)]
    if one.dtype != other.dtype:
        what.append(" -> ".join(str(t.dtype).removeprefix("torch.") for t in (one, other)))
    numbers = (both, apart) if alike else (None, None)
    return _difference(name, "tensor", equal, squares, *numbers, ", ".join(what))


def _difference(
    name: str,
    kind: str,
    equal: bool,
    squares: Sequence[float],
    both: float | None,
    apart: float | None,
    what: str,
) -> Difference:
    norms = math.sqrt(max(squares[0], 0.0)), math.sqrt(max(squares[1], 0.0))
    size = norms[0] * norms[1]
    cosine = None if both is None or not size else max(-1.0, min(1.0, both / size))
    distance = None if apart is None or not norms[0] else math.sqrt(max(apart, 0.0)) / norms[0]
    return Difference(name, kind, equal, norms, cosine, distance, what)


def _config(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    found = {name: (one.get(name), other.get(name)) for name in sorted({*one, *other})}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors have the same type, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
