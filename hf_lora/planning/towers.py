"""The towers of a model: each a row of blocks with embeddings of its own, as one that sees has one.

A tower is the largest module around one row of numbered blocks that has no other row in it. A model
of one row has none. A pattern such as ``q_proj`` may mean layers of one tower only, since another
calls its own ``qkv``; nobody notices that from a loss that falls.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.layers.probe import host_class
from hf_lora.planning.parts import texts_of
from hf_lora.targets import inside, parents

_FEWEST = 2
_MOST_NAMES = 4


@dataclasses.dataclass(frozen=True)
class Tower:
    """One tower, and what of it gets an update."""

    path: str
    host: str
    """Its class."""

    layers: int
    """How many linear layers there are in it."""

    adapted: int
    """How many layers of any kind get an update, or train in full."""


def find_towers(
    modules: Mapping[str, nn.Module], linear: Collection[str], adapted: Collection[str]
) -> tuple[Tower, ...]:
    """Return a model's towers in order; none if it is one.

    Args:
        modules: Path to module, for all of the model.
        linear: Paths of the linear layers.
        adapted: Paths of what gets an update or trains in full.
    """
    rows = list(_rows(modules, linear))
    around = [{*parents(row)} for row in rows]
    found = {}
    for row, above in zip(rows, around, strict=True):
        others = set().union(*(other for other in around if other is not above))
        own = [path for path in above if path not in others]
        if own:
            found[min(own, key=len)] = row
    if len(found) < _FEWEST:
        return ()
    return tuple(
        Tower(
            path,
            host_class(modules[path]).__name__,
            sum(inside(layer, (path,)) for layer in linear),
            sum(inside(layer, (path,)) or inside(path, (layer,)) for layer in adapted),
        )
        for path in modules
        if path in found
    )


def unnamed(
    towers: Collection[Tower], config: LoRAConfig, linear: Collection[str]
) -> Iterator[str]:
    """Yield a line for each tower without any update that no target and no exclusion speaks of."""
    said = " ".join([*texts_of(config), *config.exclude])
    named = any(_last(tower.path) in said for tower in towers)
    if named or not any(tower.adapted for tower in towers):
        return
    for tower in towers:
        if tower.adapted or not tower.layers:
            continue
        last = dict.fromkeys(_last(path) for path in linear if inside(path, (tower.path,)))
        called = [name for name in last if not name.isdigit()][:_MOST_NAMES]
        yield (
            f"{tower.path} ({tower.host}): the targets mean none of its {tower.layers} linear "
            f"layers, such as {', '.join(called)}; name them as well, or say "
            f"exclude=[{_last(tower.path) + '.*'!r}]"
        )


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _rows(modules: Mapping[str, nn.Module], linear: Collection[str]) -> Iterator[str]:
    """Yield the paths of the topmost rows of blocks that have linear layers in them."""
    deep = {above for path in linear for above in parents(path)}
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList) and path in deep:
            blocks = [f"{path}.{name}" for name, _ in module.named_children()]
            within = any(isinstance(modules[above], nn.ModuleList) for above in parents(path))
            if not within and any(block in deep for block in blocks):
                yield path
