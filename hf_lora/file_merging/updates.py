"""What adapters do to each tensor of a model, and whether tied tensors stay one."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from hf_lora.adapter_io.match import Match
from hf_lora.file_merging.base import CheckpointBase, tensor_of
from hf_lora.file_merging.pieces import Piece, Stack, as_stack
from hf_lora.functional.low_rank import Product
from hf_lora.kinds.table import layer_class
from hf_lora.layers.roles import OWN_BIAS
from hf_lora.layers.token_rows import ROWS
from hf_lora.layers.trained import stored, tensor_names
from hf_lora.planning.ties import full_name

Rows = Callable[[int, int], torch.Tensor]
"""Returns the rows from one to another of a rectangle."""

_KEPT = 2
"""Of how many layers the factors are kept in memory: a stack of experts is asked for by parts."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter that is merged."""

    name: str
    """As it was given, for people."""

    match: Match
    weight: float


@dataclasses.dataclass(frozen=True)
class Update:
    """What one adapter does to one tensor of a model."""

    adapter: int
    path: str
    """Of the module."""

    part: str
    """The name of the tensor on it."""

    adds: bool
    """Whether a product of factors is added; if not, the adapter's own copy is put in its place."""

    values: str | None = None
    """The key of that copy in the adapter's file; None where the base has grown by it."""

    rows: tuple[int, ...] | None = None
    """Those of the tensor's rows that the copy has, in its order; None if it has all."""

    shares: bool = False
    """Whether it is a module trained in full, of which several adapters can only make a mean."""


class Updates:
    """All that a number of adapters do to a model."""

    def __init__(self, base: CheckpointBase, adapters: Sequence[Adapter]):
        self.base = base
        self.adapters = tuple(adapters)
        self.problems: list[str] = []
        self._of: dict[str, list[Update]] = {}
        self._seen: dict[str, Stack] = {}
        self._keys: dict[tuple[int, str], dict[str, str]] = {}
        """Number of an adapter and path of a module, to role to key in the file."""

        for number, adapter in enumerate(adapters):
            self._note(number, adapter.match)
        self._product = functools.lru_cache(_KEPT)(self._read_products)

    def named(self) -> Iterator[tuple[str, tuple[Update, ...]]]:
        """Yield each tensor's name in the model and what is done to it, also if that is nothing."""
        first = {id(module): path for path, module in self.base.model.named_modules()}
        for path, module in self.base.model.named_modules(remove_duplicate=False):
            for role in tensor_names(module):
                yield (
                    full_name((path, role)),
                    tuple(self._of.get(full_name((first[id(module)], role)), ())),
                )

    def seen(self, name: str) -> Stack:
        """Return as which stack of matrices a tensor is seen."""
        return self._seen.get(name) or as_stack(tuple(tensor_of(self.base.model, name).shape))

    def product(self, update: Update) -> Product:
        """Return the factors of an update, with the adapter's weight in them."""
        return self._product(update.adapter, update.path)[update.part]

    def copied(self, update: Update, seen: Stack, piece: Piece) -> Rows:
        """Return what gives rows of a rectangle of an adapter's copy, as they are stored.

        Args:
            update: One that is put in the base's place.
            seen: As which stack the tensor is seen.
            piece: The rectangle.
        """
        _, height, width = seen
        columns = slice(*piece.columns)

        def numbers(first: int, last: int) -> torch.Tensor:
            if update.rows is not None:  # one at a time
                first = update.rows.index(first)
                last = first + 1
            begin, end = ((piece.matrix * height + row) * width for row in (first, last))
            if update.values is None:
                _, grown = self.base.grown[
                    id(tensor_of(self.base.model, full_name((update.path, update.part))))
                ]
                flat = grown.reshape(-1)[begin:end]
            else:
                file = self.adapters[update.adapter].match.folder.file
                flat = file.part(update.values, begin, end)
            return flat.view(last - first, width)[:, columns]

        if piece.turned:
            return lambda first, last: numbers(*piece.rows).t()[first:last]
        return lambda first, last: numbers(piece.rows[0] + first, piece.rows[0] + last)

    def _note(self, number: int, match: Match) -> None:
        modules = dict(self.base.model.named_modules())
        used = set()
        for (path, role), key in match.keys.items():
            self._keys.setdefault((number, path), {})[role] = key
        for path, config in match.slots.items():
            kind, module = layer_class(modules[path]), modules[path]
            fault = kind.lora_product_fault(module)
            if fault:
                self.problems.append(f"{path}: {fault}")
                continue
            shapes = match.folder.file.shapes
            keys = self._keys[number, path]
            # of one number each: the meta device takes a hundred times as long
            blank = {r: torch.zeros(1).expand(shapes[key]) for r, key in keys.items()}
            used |= {(path, role) for role in keys if role != OWN_BIAS}
            for part, product in kind.lora_products(module, config, blank).items():
                if part not in tensor_names(module):
                    self.problems.append(f"{path} has no {part} that could take its update")
                one, two, three = *product.left.shape[:2], product.right.shape[2]
                self._add(full_name((path, part)), Update(number, path, part, True))
                self._seen[full_name((path, part))] = (one, two, three)
        ties, low_rank = dict(match.ties), frozenset(used)
        for path, module in modules.items():
            for role in tensor_names(module):
                first = ties.get((path, role), (path, role))
                key = match.keys.get(first) if first not in low_rank else None
                name = full_name((path, role))
                if key is not None:
                    used.add(first)
                    if role in module._buffers and self.adapters[number].weight != 1.0:
                        self.problems.append(f"{name}: what counts cannot be weighed")
                    mean = first[0] not in match.slots
                    self._add(name, Update(number, *first, False, key, shares=mean))
                elif (own := id(stored(module, role))) in self.base.grown and name not in self._of:
                    self._add(name, Update(number, *self.base.grown[own][0], False))
        for path, rows in match.rows.items():
            owner = path if rows.of is None else rows.of
            key = match.keys[owner, ROWS]
            used.add((owner, ROWS))
            name = full_name((path, "weight"))
            self._add(name, Update(number, owner, "weight", False, key, rows.ids))
        self.problems += [
            f"{path}: the adapter has a {role}, of which file-to-file merging knows nothing"
            for path, role in sorted(match.keys.keys() - used)
        ]

    def _add(self, name: str, update: Update) -> None:
        self._of.setdefault(name, []).append(update)

    def _read_products(self, number: int, path: str) -> dict[str, Product]:
        adapter = self.adapters[number]
        match, module = adapter.match, self.base.model.get_submodule(path)
        roles = {key: role for role, key in self._keys[number, path].items()}
        tensors = {roles[key]: tensor for key, tensor in match.folder.file.read(list(roles))}
        made = layer_class(module).lora_products(module, match.slots[path], tensors)
        return {part: Product(p.left * adapter.weight, p.right) for part, p in made.items()}


def shared_names(model: nn.Module, names: Mapping[str, object]) -> list[list[str]]:
    """Return the names that each tensor of a model has, those of a tied one together."""
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(id(tensor_of(model, name)), []).append(name)
    return list(found.values())
