"""What a report tells of adapters: figures of each layer, the training, who can use it."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_lora.adapter_io.describe import Description, describe
from hf_lora.algebra.layers import read_term
from hf_lora.algebra.similarity import similarity
from hf_lora.algebra.sources import Adapter, opened
from hf_lora.clients.export import servable
from hf_lora.clients.records import Verdict
from hf_lora.errors import ConfigError
from hf_lora.file_merging.base import CheckpointBase, model_without_data
from hf_lora.file_merging.checkpoint import Checkpoint
from hf_lora.functional.decompose import effective_rank, spaces, spectrum
from hf_lora.recipes.history import History, read_history
from hf_lora.recipes.record import known_training

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """One layer's update."""

    path: str
    kind: str
    """The path with a star for the first number in it: what the layer is in its block."""

    number: int | None
    """That number: of the block."""

    rank: int
    norm: float
    """Frobenius norm of the update."""

    values: tuple[float, ...]
    """Singular values of it, the largest first; of several matrices those of all."""

    effective_rank: float
    relative: float | None = None
    """The norm over that of the base's weight; None without a base to ask."""


@dataclasses.dataclass(frozen=True)
class AdapterFigures:
    """One adapter."""

    name: str
    """As it was named, without what lies before."""

    description: Description
    layers: tuple[LayerFigures, ...]
    history: History
    training: Any
    """What is known of the training, for the card; None of adapters made elsewhere."""

    clients: tuple[Verdict, ...]


@dataclasses.dataclass(frozen=True)
class ReportFigures:
    """One or several adapters, and how much alike they are."""

    adapters: tuple[AdapterFigures, ...]
    similarities: tuple[tuple[float | None, ...], ...]
    """Cosine of the updates of each with each; None where they have no layers in common."""

    base: str | None
    """What weights the norms were compared with."""


def collect(
    sources: Sequence[str],
    *,
    base: str | None = None,
    progress: Progress = lambda words, done, total: None,
) -> ReportFigures:
    """Read adapters and find out all that a report tells.

    Args:
        sources: Folders, or ids on the Hub.
        base: Folder of the base whose weights the updates are compared with.
        progress: Called with what is being done, and how far it is.

    Raises:
        ConfigError: No adapter is named.
        AdapterFileError, HubError: As for :func:`hf_lora.load`.
    """
    if not sources:
        raise ConfigError("there is no adapter to report on")
    found = []
    with opened([(source, 1.0) for source in sources], model=None, token=None) as adapters:
        for adapter in adapters:
            found.append(_adapter(adapter, base, progress))
    names = [each.name for each in found]
    if len(set(names)) < len(names):
        found = [
            dataclasses.replace(each, name=source)
            for each, source in zip(found, sources, strict=True)
        ]
    return ReportFigures(tuple(found), _similarities(sources, progress), base)


def _adapter(adapter: Adapter, base: str | None, progress: Progress) -> AdapterFigures:
    folder = adapter.folder
    place = folder.file.path.parent
    relative = _relative(adapter, base) if base else lambda path, norm: None
    layers = []
    for number, path in enumerate(folder.factors, 1):
        layers.append(_layer(adapter, path, relative))
        progress(f"spectra of {adapter.name}", number, len(folder.factors))
    try:
        training = known_training(place)
    except ConfigError:  # of a version to come, or edited: the adapter is sound without it
        training = None
    return AdapterFigures(
        name=Path(adapter.name).name if Path(adapter.name).exists() else adapter.name,
        description=describe(place),
        layers=tuple(layers),
        history=_history(place),
        training=training,
        clients=servable(place, base=base).clients,
    )


def _history(place: Path) -> History:
    try:
        rows = read_history(place)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _layer(
    adapter: Adapter, path: str, relative: Callable[[str, float], float | None]
) -> LayerFigures:
    term = read_term(adapter, path)
    values, ranks = [], []
    for product in term.products().values():
        common = spaces([product])
        found = spectrum(common, common.cores[0] * term.strength).values
        values += found.flatten().abs().tolist()
        ranks += [effective_rank(each) for each in found.abs()]
    number = _NUMBER.search(f"{path}.")
    norm = math.sqrt(math.fsum(value * value for value in values))
    return LayerFigures(
        path=path,
        kind=_NUMBER.sub("*", f"{path}.", count=1).rstrip("."),
        number=None if number is None else int(number.group()),
        rank=term.config.r,
        norm=norm,
        values=tuple(sorted(values, reverse=True)),
        effective_rank=sum(ranks) / max(len(ranks), 1),
        relative=relative(path, norm),
    )


def _relative(adapter: Adapter, source: str) -> Callable[[str, float], float | None]:
    """Return what says how large an update's norm is beside that of the base's weight there."""
    checkpoint = Checkpoint(Path(source))
    base = CheckpointBase(model_without_data(checkpoint, adapter.folder), checkpoint)

    def relative(path: str, norm: float) -> float | None:
        weight = base.read(f"{path}.weight" if path else "weight")
        size = 0.0 if weight is None else float(weight.double().norm())
        return norm / size if size else None

    return relative


def _similarities(
    sources: Sequence[str], progress: Progress
) -> tuple[tuple[float | None, ...], ...]:
    if len(sources) < 2:
        return ((1.0,),)
    found: dict[tuple[int, int], float | None] = {}
    pairs = [(i, j) for i in range(len(sources)) for j in range(i)]
    for number, (i, j) in enumerate(pairs, 1):
        try:
            total = similarity(sources[i], sources[j], check_base=False).total
        except ValueError:  # for different layers
            total = None
        found[i, j] = found[j, i] = total
        progress("similarities", number, len(pairs))
    size = range(len(sources))
    return tuple(tuple(1.0 if i == j else found[i, j] for j in size) for i in size)


def dead(figures: AdapterFigures) -> list[str]:
    """Return the paths of layers whose update is nothing."""
    return [layer.path for layer in figures.layers if layer.norm == 0.0]


def total_norm(figures: AdapterFigures) -> float:
    """Return the Frobenius norm of all updates together."""
    return math.sqrt(math.fsum(layer.norm**2 for layer in figures.layers))
