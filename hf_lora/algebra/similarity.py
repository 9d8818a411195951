"""``similarity``: how much alike the updates of two adapters are, layer by layer."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_lora.algebra.layers import Term, read_term
from hf_lora.algebra.sources import Source, check_bases, check_layers, opened
from hf_lora.functional.decompose import inner
from hf_lora.functional.low_rank import Product
from hf_lora.text import by_number, printable


@dataclasses.dataclass(frozen=True)
class LayerSimilarity:
    """Two updates of one layer."""

    cosine: float
    """Of the angle between them, in [-1, 1]; 0 where one is zero."""

    norms: tuple[float, float]
    """Frobenius norms; 0 where an adapter has nothing for the layer."""


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How much alike two adapters are; ``print`` shows it.

    Two trainings of the same from different starts have cosines well above 0, unrelated ones are
    near 0, and what one undoes of the other is below.
    """

    one: str
    other: str
    total: float
    """Cosine of all updates together, as one vector."""

    layers: Mapping[str, LayerSimilarity]
    """Path of each layer that either has."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dataclasses.asdict(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return it as JSON, and write it to a file if one is named."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text)
        return text

    def __str__(self) -> str:
        rows = [("layer", "cosine", "norm of one", "of other")]
        for path, each in self.layers.items():
            one, other = (f"{norm:.4g}" for norm in each.norms)
            rows.append((path or "(the model itself)", f"{each.cosine:+.3f}", one, other))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = [
            "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines = [f"one: {self.one}", f"other: {self.other}", f"cosine of all: {self.total:+.4f}"]
        return printable("\n".join([*lines, *table]), longest=None)


def similarity(
    one: Source,
    other: Source,
    *,
    model: nn.Module | None = None,
    check_base: bool = True,
    token: str | bool | None = None,
) -> Similarity:
    """Compare the low-rank updates of two adapters, from their factors.

    Args:
        one: Folder, id on the Hub or, with ``model``, name of an adapter.
        other: Likewise.
        model: A wrapped model, some of whose adapters are named.
        check_base: Whether to refuse adapters that were trained on different bases.
        token: For private repos.

    Returns:
        The cosine of their updates and these's norms, for each layer and for all. What is trained
        in full is not compared here; see :func:`hf_lora.diff`.

    Raises:
        AdapterFileError, HubError: As for :func:`hf_lora.load`.
        AdapterMismatchError: They are for different layers.
        BaseMismatchError: They were trained on different bases.
    """
    with opened([(one, 1.0), (other, 1.0)], model=model, token=token) as pair:
        check_layers(pair)
        if check_base:
            check_bases(pair)
        layers = {}
        products: list[float] = []
        for path in sorted({p for each in pair for p in each.folder.factors}, key=by_number):
            terms = [read_term(a, path) if path in a.folder.factors else None for a in pair]
            both = [{} if term is None else _products(term) for term in terms]
            norms = tuple(_norm(parts) for parts in both)
            product = math.fsum(inner(both[0][p], both[1][p]) for p in both[0] if p in both[1])
            products.append(product)
            layers[path] = LayerSimilarity(_cosine(product, norms), norms)  # type: ignore[arg-type]
        whole = [math.hypot(*(each.norms[i] for each in layers.values())) for i in range(2)]
        total = _cosine(math.fsum(products), tuple(whole))
        return Similarity(pair[0].name, pair[1].name, total, layers)


def _products(term: Term) -> dict[str, Product]:
    found = term.products().items()
    return {part: Product(p.left.double() * term.strength, p.right) for part, p in found}


def _norm(parts: Mapping[str, Product]) -> float:
    return math.sqrt(max(math.fsum(inner(p, p) for p in parts.values()), 0.0))


def _cosine(product: float, norms: tuple[float, ...]) -> float:
    size = math.prod(norms)
    return min(1.0, max(-1.0, product / size)) if size else 0.0
