"""What ``train_rows`` means on a model: which modules, and which of them share their rows.

A tie stays a tie: where several modules share a weight, an adapter has its rows once, and each of
the modules reads them, whichever of them is named.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from hf_lora.compat.deepspeed import shape_of
from hf_lora.config import LoRAConfig
from hf_lora.kinds.token_rows import rows_fault
from hf_lora.layers.hosts import chosen_dtype
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.probe import host_class
from hf_lora.layers.token_rows import TokenRows
from hf_lora.layers.trained import copy_dtype
from hf_lora.planning.ties import Owners
from hf_lora.planning.tree import Tree
from hf_lora.targets import inside, nearest
from hf_lora.text import some

Rows = Mapping[str, TokenRows]
"""Path of each module to its rows."""


@dataclasses.dataclass(frozen=True)
class RowTarget:
    """One module of which some rows train."""

    path: str
    host: str
    """The module's class."""

    ids: tuple[int, ...]
    """The rows."""

    width: int
    """Numbers in each."""

    dtype: torch.dtype
    tied_to: tuple[str, ...]
    """Other modules that share the weight, and in which the rows train as well."""

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return len(self.ids) * self.width

    @property
    def bytes(self) -> int:
        """Size of all of them."""
        return self.parameters * self.dtype.itemsize

    @property
    def parameter_bytes(self) -> int:
        """Size of what receives gradients: all of it."""
        return self.bytes


def match_rows(
    tree: Tree, config: LoRAConfig, owners: Owners
) -> tuple[dict[str, TokenRows], list[str]]:
    """Find out what ``config.train_rows`` means on a model.

    Args:
        tree: The model's modules.
        config: The configuration, with numbers in the place of all tokens.
        owners: Which modules share a weight.

    Returns:
        The rows, in the model's order; and a line for each thing that is wrong.
    """
    if not config.train_rows:
        return {}, []
    modules = tree.modules
    problems: list[str] = []
    wanted = dict(_named(tree, config, problems))
    found: dict[str, TokenRows] = {}
    for path in modules:
        if path not in wanted or path in found:
            continue
        ids = wanted[path]
        shared = owners.others([(path, "weight")], path)
        places = [each for each in modules if each == path or each in shared]
        for each in places:
            fault = tree.unheard.get(each) or rows_fault(modules[each])
            tied = f"{each} is tied with {path}, and cannot follow it" if each != path else each
            if fault:
                problems.append(f"train_rows: {tied}: {fault}")
            elif wanted.get(each, ids) != ids:
                problems.append(
                    f"train_rows: {each} and {path} share one weight, and are given different rows"
                )
            found[each] = TokenRows(ids, None if each == places[0] else places[0])
        weight = parameter_of(modules[path], "weight")
        count = shape_of(weight)[0] if weight is not None and weight.ndim else 0
        beyond = [row for row in ids if row >= count]
        if beyond and not problems:
            problems.append(
                f"train_rows: {path} has {count} rows, and none of the numbers "
                f"{some(map(str, beyond))}; for tokens that were added to the tokenizer, "
                f"model.resize_token_embeddings({max(beyond) + 1}) makes room before wrapping"
            )
    return {path: found[path] for path in modules if path in found}, problems


def _named(
    tree: Tree, config: LoRAConfig, problems: list[str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each module that a pattern names, and its rows."""
    seen: dict[str, str] = {}
    for text, ids in config.train_rows.items():
        meant = tree.named(text)
        if not meant:
            near = nearest(text, _with_rows(tree)) or sorted(_with_rows(tree))
            problems.append(
                f"train_rows {text!r} matches no module; near: {', '.join(near[:8]) or 'nothing'}"
            )
        for path in meant:
            if config.train_rows[seen.setdefault(path, text)] != ids:
                problems.append(
                    f"train_rows: {path} is given different rows by {seen[path]!r} and {text!r}"
                )
            yield path, tuple(row for row in ids if isinstance(row, int))


def _with_rows(tree: Tree) -> list[str]:
    embeddings = (path for path, module in tree.modules.items() if isinstance(module, nn.Embedding))
    return [*embeddings, *sorted(tree.head)]


def row_conflicts(
    rows: Collection[str],
    trained: Collection[str],
    low_rank: Collection[str],
    in_full: Collection[str],
) -> Iterator[str]:
    """Yield why modules cannot have rows: they, or those above them, carry something else.

    Args:
        rows: Paths of the modules.
        trained: What this adapter trains in full, and what follows that.
        low_rank: Where other adapters have low-rank updates.
        in_full: Where others train in full.
    """
    for path in rows:
        if inside(path, trained):
            yield f"train_rows: {path} is trained in full"
        if path in low_rank:
            yield f"train_rows: {path} has a low-rank update from another adapter"
        if path in in_full:
            yield f"train_rows: {path} is trained in full by another adapter"


def row_targets(
    modules: Mapping[str, nn.Module], config: LoRAConfig, rows: Rows
) -> Iterable[RowTarget]:
    """Return what is known of rows: those that several modules share once."""
    for path, own in rows.items():
        weight = parameter_of(modules[path], "weight")
        if own.of is None and weight is not None and weight.ndim == 2:
            yield RowTarget(
                path=path,
                host=host_class(modules[path]).__name__,
                ids=own.ids,
                width=shape_of(weight)[1],
                dtype=copy_dtype(weight, chosen_dtype(config)),
                tied_to=tuple(other for other, each in rows.items() if each.of == path),
            )
