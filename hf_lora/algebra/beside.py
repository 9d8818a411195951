"""What adapters hold beside low-rank updates: modules and rows in full, biases, moved buffers.

These are copies that stand in the base's place, and no updates that could be added. Where all
adapters have the same they are kept. Where they differ the weighted sum means something if the
weights add up to 1: the base's part is in it once.
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from hf_lora.adapter_io.tasks import BY_PEFT
from hf_lora.adapter_io.tensors import buffer_key, key_of
from hf_lora.algebra.method import Method
from hf_lora.algebra.sources import Adapter
from hf_lora.errors import AdapterMismatchError, listing
from hf_lora.files.biases import biases_beside
from hf_lora.files.labels import LABELS
from hf_lora.files.patterns import endings, parents
from hf_lora.files.read import AdapterFolder
from hf_lora.files.token_rows import FIELD
from hf_lora.kinds.token_rows import KEY
from hf_lora.layers.reading import OUT
from hf_lora.layers.roles import BESIDE, OWN_BIAS
from hf_lora.layers.token_rows import TokenRows
from hf_lora.targets import inside
from hf_lora.text import some

_SUM = 1e-6
"""How far weights may be from 1 in sum."""

_WAY = (
    "Tensors that were trained in full are no updates that could be added. Where they are equal "
    "they are kept, and weights that add up to 1 make a mean of them, by cat or svd. Otherwise use "
    "the adapters beside each other (hf_lora.load each, then activate), or merge one into the base "
    "and train the other there."
)


@dataclasses.dataclass(frozen=True)
class Beside:
    """The tensors of a result that are no low-rank updates, and what they are."""

    tensors: dict[str, torch.Tensor]
    """Key in PEFT's notation to tensor."""

    biased: frozenset[str]
    """Paths of the layers that have a copy of their own bias."""

    trained: tuple[str, ...]
    trained_names: list[str]
    buffers: tuple[str, ...]
    rows: dict[str, TokenRows]
    row_names: tuple[str, ...]
    ties: dict[str, str]
    told: list[str]


def beside(adapters: Sequence[Adapter], method: Method) -> Beside:
    """Return what adapters have in full, as far as they agree or can be averaged.

    Raises:
        AdapterMismatchError: They do not; all of it is named.
    """
    return _Comparing(adapters, method).run()


def trained_tops(folder: AdapterFolder) -> list[str]:
    """Return the outermost modules that were trained in full, under the names of the file."""
    if folder.own is not None:
        return list(folder.own.trained)
    task = BY_PEFT.get(folder.fields.get("task_type") or "")
    heads = frozenset() if task is None else task.heads
    names = set(folder.trained_names) | heads
    found: dict[str, None] = {}
    for name in folder.others:
        path = name.rpartition(".")[0]
        meant = [each for each in (path, *parents(path)) if each and endings(each, names)]
        found |= dict.fromkeys(meant[-1:])
    return list(found)


def place_inside(path: str, adapted: Collection[str]) -> str:
    """Return what stands before the keys of a layer: of the last one of an attention, PEFT's place.

    Args:
        path: The layer's.
        adapted: Paths of all layers of the adapter.
    """
    above, _, name = path.rpartition(".")
    return f"{BESIDE}base_layer.{OUT}." if name == OUT and above in adapted else ""


class _Comparing:
    def __init__(self, adapters: Sequence[Adapter], method: Method):
        self.adapters = adapters
        self.total = sum(adapter.weight for adapter in adapters)
        self.averages = method.is_linear and abs(self.total - 1) <= _SUM
        self.problems: list[str] = []
        self.averaged: list[str] = []

    def run(self) -> Beside:
        first = self.adapters[0].folder
        tops = self._common("modules trained in full", lambda f: sorted(trained_tops(f)))
        names = self._common("what modules_to_save names", lambda f: sorted(f.trained_names))
        buffers = self._common("moved buffers", lambda f: sorted(f.own.buffers) if f.own else [])
        ties = self._common("ties", lambda f: dict(f.own.ties) if f.own else {})
        self._check_the_rest()
        held = [adapter.folder.others for adapter in self.adapters]
        biases = [_biases(adapter.folder) for adapter in self.adapters]
        floats = {*biases_beside(first.others, first.fields, first.trained_names)}
        layers = {path for adapter in self.adapters for path in adapter.folder.factors}
        tensors = {}
        for name, values in self._in_all(held):
            may = inside(name.rpartition(".")[0], tops) or name in floats
            found = self._one(name, values, may)
            if found is not None:
                tensors[buffer_key(name, layers)] = found
        biased = set()
        for name, values in self._in_all(biases):
            found = self._one(f"{name}.{OWN_BIAS}", values, True)
            if found is not None:
                key = f"{place_inside(name, layers)}base_layer.{OWN_BIAS}"
                tensors[key_of(name, key)] = found
                biased.add(name)
        rows, row_names = self._rows(tensors)
        if self.problems:
            raise AdapterMismatchError(
                listing("What these adapters trained in full differs", self.problems, _WAY)
            )
        told = []
        if self.averaged:
            told.append(f"the weights add up to 1, and these are means: {some(self.averaged)}")
        return Beside(
            tensors=tensors,
            biased=frozenset(biased),
            trained=tuple(tops),
            trained_names=names,
            buffers=tuple(buffers),
            rows=rows,
            row_names=row_names,
            ties=ties,
            told=told,
        )

    def _common(self, what: str, of: Any) -> Any:
        """Return what all folders say; a line for each that says otherwise."""
        first, *others = self.adapters
        said = of(first.folder)
        for other in others:
            here = of(other.folder)
            if here != said:
                words = [some(each) or "none" for each in (said, here)]
                self.problems.append(
                    f"{what}: {first.name} has {words[0]}, {other.name} {words[1]}"
                )
        return said

    def _check_the_rest(self) -> None:
        self._common("labels", lambda folder: (folder.header or {}).get(LABELS) or {})
        for adapter in self.adapters:
            folder = adapter.folder
            if folder.own is None and (folder.ties_embeddings or folder.tied_rows or folder.rows):
                self.problems.append(
                    f"{adapter.name} was made by PEFT, and only a model tells which modules share "
                    "its rows or tied tensors: hf_lora.load it and name it with model="
                )

    def _in_all(
        self, held: Sequence[Mapping[str, str]]
    ) -> Iterable[tuple[str, list[torch.Tensor]]]:
        """Yield names and values of what every adapter has; a line for the others."""
        for name in dict.fromkeys(name for each in held for name in each):
            having = [name in each for each in held]
            if not all(having):
                one = self.adapters[having.index(True)].name
                other = self.adapters[having.index(False)].name
                self.problems.append(f"{name}: {one} has it in full, {other} does not")
                continue
            yield (
                name,
                [
                    tensor
                    for adapter, each in zip(self.adapters, held, strict=True)
                    for _, tensor in adapter.folder.file.read([each[name]])
                ],
            )

    def _one(self, name: str, values: Sequence[torch.Tensor], may: bool) -> torch.Tensor | None:
        """Return the one tensor that several amount to, or None after a line about it."""
        first, *others = values
        if all(_same(first, other) for other in others):
            return first
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            self.problems.append(f"{name} has the shapes {' and '.join(map(str, sorted(shapes)))}")
        elif not (self.averages and may and all(v.is_floating_point() for v in values)):
            why = f"; the weights add up to {self.total:g}" if may else ""
            self.problems.append(f"{name} has different numbers in each{why}")
        else:
            self.averaged.append(name)
            dtype = first.dtype
            for value in others:
                dtype = torch.promote_types(dtype, value.dtype)
            weights = [adapter.weight for adapter in self.adapters]
            total = sum(v.double() * w for v, w in zip(values, weights, strict=True))
            return total.to(dtype)  # type: ignore[union-attr]
        return None

    def _rows(
        self, tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[str, TokenRows], tuple[str, ...]]:
        said = self._common("rows", lambda folder: {} if folder.own is None else folder.own.rows)
        held = [{p: r.key for p, r in adapter.folder.rows.items()} for adapter in self.adapters]
        names = []
        for path, values in self._in_all(held):
            found = self._one(f"rows of {path}", values, True)
            if found is not None:
                tensors[key_of(path, KEY)] = found
                names.append(path)
        by_peft = self.adapters[0].folder.fields.get(FIELD)
        named = by_peft if isinstance(by_peft, dict) else {}
        return dict(said), tuple(name for name in names if name in named)


def _biases(folder: AdapterFolder) -> dict[str, str]:
    """Return path to key of the layers' own biases that were trained."""
    found = {path: held.keys.get(OWN_BIAS) for path, held in folder.factors.items()}
    return {path: key for path, key in found.items() if key is not None}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors have the same type, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)
