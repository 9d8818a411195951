"""Finding a model's modules under the names that an adapter file uses for them.

Files come from backbones and head models, from other versions of transformers, from wrapped models.
Each known way of renaming is tried in turn; the first under which every name is found wins.
"""

import re
from collections.abc import Callable, Collection, Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

Rename = Callable[[str], str]


def resolve(names: Collection[str], known: Collection[str], model: nn.Module) -> tuple[Rename, str]:
    """Return how names in a file become names in ``model``, and words for it.

    Args:
        names: Names in the file.
        known: All names that exist in the model.
        model: The model.

    Returns:
        The renaming, and what it does in words, or ``""`` if it does nothing. If no renaming
        finds all names, the one that finds most.
    """
    best: tuple[int, Rename, str] = (-1, lambda name: name, "")
    for rename, words in _ways(names, model):
        hits = sum(rename(name) in known for name in names)
        if hits == len(names):
            return rename, words
        if hits > best[0]:
            best = (hits, rename, words)
    return best[1], best[2]


def _ways(names: Collection[str], model: nn.Module) -> Iterator[tuple[Rename, str]]:
    yield lambda name: name, ""
    converted = _transformers_renames(model)
    ways: list[tuple[Rename, str]] = [(lambda name: name, "")]
    if converted is not None:
        yield converted, "names of an older transformers were converted"
        ways.append((converted, "names of an older transformers were converted; "))
    prefix = getattr(model, "base_model_prefix", "")
    for first, words in ways:
        if prefix and hasattr(model, prefix):
            yield (
                lambda name, first=first: first(f"{prefix}.{name}"),
                f"{words}trained on the backbone alone: {prefix!r} was put before its names",
            )
        for lead in _common_leads(names):
            yield (
                lambda name, first=first, lead=lead: first(name.removeprefix(lead)),
                f"{words}trained on a model around this one: {lead!r} was taken off its names",
            )


def _common_leads(names: Collection[str]) -> Iterator[str]:
    """Yield the dotted beginnings that all names share, shortest first."""
    first = next(iter(names), "")
    for match in re.finditer(r"\.", first):
        lead = first[: match.end()]
        if not all(name.startswith(lead) for name in names):
            return
        yield lead


def _transformers_renames(model: nn.Module) -> Rename | None:
    """Return transformers' own conversion of a checkpoint's names, or None if it has none."""
    if not isinstance(model, PreTrainedModel):
        return None
    renamings = [
        item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)
    ]
    if not renamings:
        return None

    def rename(name: str) -> str:
        key = f"{name}.weight"
        for item in renamings:
            key = item.rename_source_key(key)[0]
        return key.removesuffix(".weight")

    return rename
