"""What an adapter folder holds, told from its files alone: no base model, no product of factors."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hf_lora.config import LoRAConfig
from hf_lora.errors import listing
from hf_lora.files.biases import biases_beside
from hf_lora.files.data import LayerTensors
from hf_lora.files.fingerprint import from_json
from hf_lora.files.read import AdapterFolder, read_folder
from hf_lora.files.sampled_layers import sampled_layers
from hf_lora.functional.decompose import effective_rank, spaces, spectrum
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.planning.records import size, some_paths
from hf_lora.text import by_number, printable

_BAR, _LEAST_BAR = 24, 6
_WIDTH, _BESIDE_BAR = 80, 35
"""Of a line, and of what stands in it beside the path, the sizes and the bar."""


@dataclasses.dataclass(frozen=True)
class LayerFacts:
    """One adapted layer."""

    path: str
    r: int
    alpha: float
    scaling: float
    in_features: int | None
    out_features: int | None
    sizes: str
    """What the layer turns into what, for people: ``"64 -> 128"``."""

    parameters: int
    dtype: str
    bytes: int
    norm: float
    """Frobenius norm of the update ``s · B A``; nan if a number in it is not finite."""

    values: tuple[float, ...] = ()
    """Its singular values, the largest first; of several matrices (experts, groups) the root mean
    square of theirs. Empty if a number is not finite, or the update is no product."""

    effective_rank: float | None = None
    """How many of them count: the exponential of the entropy of their shares (Roy and Vetterli,
    2007), between 1 and the rank; 0 if the update is zero, None if there are none."""


@dataclasses.dataclass(frozen=True)
class TrainedFacts:
    """One tensor of a module that was trained in full."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Description:
    """An adapter folder. ``print(description)`` shows it as text."""

    folder: str
    base: str | None
    revision: str | None
    task: str | None
    layers: tuple[LayerFacts, ...]
    trained_names: tuple[str, ...]
    """Modules trained in full: their paths, or in files made elsewhere their names."""

    trained: tuple[TrainedFacts, ...]
    """Their tensors, and the buffers that the training moved."""

    rows: tuple[TrainedFacts, ...]
    """The rows of modules that were trained, under the paths of these."""

    buffers: tuple[str, ...]
    """Names of the buffers of the base that the training moved."""

    biases: tuple[str, ...]
    """Names of the biases that were trained in modules of no adapted layer."""

    dropout: float
    rslora: bool
    header: dict[str, Any] | None
    """Format version and fingerprint, from hf_lora's header; None for files made elsewhere."""

    config: LoRAConfig | None
    """The configuration that hf_lora trained it with; None for files made elsewhere."""

    not_finite: tuple[str, ...]
    """Tensors that hold a nan or an infinity; such an adapter cannot be loaded."""

    file_bytes: int
    format: str = "PEFT's format"
    """Whose format the file is in."""

    left_out_bytes: int = 0
    """Bytes of tensors that repeat others, or the base's, beside modules trained in full."""

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(layer.parameters for layer in self.layers) + sum(
            math.prod(tensor.shape) for tensor in (*self.trained, *self.rows)
        )

    @property
    def dead(self) -> list[str]:
        """Paths of the layers whose update is exactly zero."""
        return [layer.path for layer in self.layers if layer.norm == 0.0]

    @property
    def causes(self) -> dict[str, int]:
        """What the weights' file is made of: cause to bytes; they add up to its size."""
        sizes: dict[str, int] = {}
        for layer in self.layers:
            cause = f"{_tail(layer.path)}, rank {layer.r}, {layer.dtype}"
            sizes[cause] = sizes.get(cause, 0) + layer.bytes
        for tensor in self.trained:
            path, _, role = tensor.name.rpartition(".")
            moved = tensor.name in self.buffers
            cause = f"{role} that moved" if moved else f"{path or tensor.name} in full"
            cause = "biases of other modules" if tensor.name in self.biases else cause
            cause = f"{cause}, {tensor.dtype}"
            sizes[cause] = sizes.get(cause, 0) + tensor.bytes
        for tensor in self.rows:
            cause = f"{tensor.shape[0]} rows of {tensor.name}, {tensor.dtype}"
            sizes[cause] = sizes.get(cause, 0) + tensor.bytes
        if self.left_out_bytes:
            sizes["left out, as the base has it"] = self.left_out_bytes
        sizes["header"] = self.file_bytes - sum(sizes.values())
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        """Return what it is, what its size is due to, and each layer with its norm."""
        return printable("\n".join(_lines(self)), longest=None)


def describe(
    directory: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Description:
    """Describe an adapter folder from its files.

    The tensors are read one layer at a time, so memory stays small. Works for folders that PEFT or
    others made.

    Args:
        directory: The folder.
        progress: Called with the number of layers and tensors done and to do.

    Raises:
        AdapterFileError: As for :func:`hf_lora.files.read.read_folder`.
    """
    folder = read_folder(directory)
    broken: list[str] = []
    others = _others(folder)
    rows = {path: each.key for path, each in folder.rows.items()}
    total = len(folder.factors) + len(others) + len(rows)
    layers = []
    for path in sorted(folder.factors, key=by_number):
        layers.append(_layer(folder, path, broken))
        progress(len(layers), total)
    trained: list[TrainedFacts] = []
    for name, key in (*others.items(), *rows.items()):
        ((_, tensor),) = folder.file.read([key])
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            broken.append(key)
        trained.append(TrainedFacts(name, tuple(tensor.shape), _name(tensor.dtype), tensor.nbytes))
        progress(len(layers) + len(trained), total)
    first = next(iter(folder.slots.values()), None)
    header = folder.header and {
        "format": folder.header["format"],
        "fingerprint": _fingerprint(folder.header.get("fingerprint")),
    }
    return Description(
        folder=str(directory),
        base=folder.base,
        revision=folder.revision,
        task=folder.fields.get("task_type"),
        layers=tuple(layers),
        trained_names=tuple(folder.trained_names if folder.own is None else folder.own.trained),
        trained=tuple(trained[: len(others)]),
        rows=tuple(trained[len(others) :]),
        buffers=() if folder.own is None else tuple(folder.own.buffers),
        biases=tuple(biases_beside(others, folder.fields, folder.trained_names)),
        dropout=first.dropout if first else 0.0,
        rslora=first.rslora if first else False,
        header=header,
        config=folder.config,
        not_finite=tuple(broken),
        file_bytes=folder.file.path.stat().st_size,
        format=folder.format,
        left_out_bytes=_left_out(folder),
    )


def _others(folder: AdapterFolder) -> dict[str, str]:
    """Return what is no factor, without the further names of one tensor."""
    again = {} if folder.own is None else folder.own.ties
    return {name: key for name, key in folder.others.items() if name not in again}


def _left_out(folder: AdapterFolder) -> int:
    """Return the bytes of tensors that stand in a file and are not read."""
    read = {key for held in folder.factors.values() for key in held.keys.values()}
    read |= {each.key for each in folder.rows.values()}
    rest = folder.file.shapes.keys() - read - {*_others(folder).values()}
    return sum(
        math.prod(folder.file.shapes[key]) * folder.file.dtypes[key].itemsize for key in rest
    )


def _layer(folder: AdapterFolder, path: str, broken: list[str]) -> LayerFacts:
    held, slot = folder.factors[path], folder.slots[path]
    values = dict(folder.file.read(list(held.keys.values())))
    bad = [key for key, tensor in values.items() if not bool(tensor.isfinite().all())]
    broken.extend(bad)
    tensors = {role: values[key] for role, key in held.keys.items()}
    widths = held.layout.widths and held.layout.widths(held.shapes)
    values_of = None if bad else _singular_values(held, tensors, slot)
    return LayerFacts(
        path=path,
        r=slot.r,
        alpha=slot.alpha,
        scaling=slot.scaling,
        in_features=widths and widths[0],
        out_features=widths and widths[1],
        sizes=held.layout.sizes(held.shapes),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtype=_name(next(iter(tensors.values())).dtype),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        norm=math.nan if bad else held.layout.norm(tensors, slot),
        values=() if values_of is None else tuple(values_of.tolist()),
        effective_rank=None if values_of is None else effective_rank(values_of),
    )


def _singular_values(
    held: LayerTensors, tensors: Mapping[str, torch.Tensor], slot: LayerConfig
) -> torch.Tensor | None:
    """Return the singular values of an update, float64, from its factors."""
    if held.layout.split is None:
        return None
    squares: list[torch.Tensor] = []
    for product in held.layout.split(tensors, slot).values():
        found = spaces([product])
        squares += spectrum(found, found.cores[0]).values.square()
    most = max(len(each) for each in squares)
    stacked = torch.stack([F.pad(each, (0, most - len(each))) for each in squares])
    return slot.scaling * stacked.mean(0).sqrt()


def _fingerprint(found: Any) -> dict[str, Any] | None:
    """Return what a fingerprint covers; its samples mean nothing to a reader."""
    if not isinstance(found, dict):
        return None
    kept = from_json(found)
    if kept is None:
        layers = sampled_layers(found)
        if not layers:
            return None
        return {"sampled_tensors": len(layers), "quantized": bool(found.get("quantized"))}
    read = [sample for sample in kept.samples.values() if sample.values is not None]
    return {
        "sampled_tensors": len(read),
        "quantized": any(sample.quantized for sample in read),
        "vocabulary": kept.vocabulary,
    }


def _lines(facts: Description) -> Iterable[str]:
    if facts.header is None:
        yield f"{facts.folder}: a LoRA adapter in {facts.format}, not made by hf_lora"
    else:
        yield f"{facts.folder}: a LoRA adapter made by hf_lora, format {facts.header['format']}"
    at = f" at revision {facts.revision}" if facts.revision else ""
    yield f"base: {facts.base or 'not named'}{at}" + (f" ({facts.task})" if facts.task else "")
    ranks = ", ".join(f"{value}" for value in sorted({layer.r for layer in facts.layers}))
    alphas = ", ".join(f"{value:g}" for value in sorted({layer.alpha for layer in facts.layers}))
    rule = "alpha / sqrt(r)" if facts.rslora else "alpha / r"
    numbers = f"rank {ranks}, alpha {alphas}, scaled by {rule}, dropout {facts.dropout:g}"
    layers = f"{len(facts.layers)} layers, {numbers}" if facts.layers else "no layers"
    yield f"{layers}; {facts.parameters:,} parameters"
    for rows in facts.rows:
        yield f"trained rows: {rows.shape[0]} of {rows.name}"
    if facts.trained_names:
        yield f"trained in full: {', '.join(facts.trained_names)}"
    if facts.buffers:
        yield f"buffers that the training moved: {some_paths(facts.buffers)}"
    if facts.config is not None:
        targets = facts.config.targets
        yield f"targets: {targets if isinstance(targets, str) else ', '.join(targets)}"
    yield _about_the_base(facts)
    yield f"size: {size(facts.file_bytes)}"
    for cause, count in facts.causes.items():
        yield f"  {size(count):>10}  {100 * count / facts.file_bytes:5.1f} %  {cause}"
    yield from _norms(facts)
    if facts.dead:
        headline = f"dead: {len(facts.dead)} of {len(facts.layers)} layers change nothing"
        yield listing(headline, [path or "(the model itself)" for path in facts.dead])
    if facts.not_finite:
        yield listing("PROBLEM: numbers that are not finite", facts.not_finite)


def _about_the_base(facts: Description) -> str:
    found = facts.header and facts.header["fingerprint"]
    if not found:
        return "fingerprint of the base: none, so a load cannot tell whether it is the right one"
    kind = "quantized" if found["quantized"] else "not quantized"
    return f"fingerprint of the base: {found['sampled_tensors']} tensors sampled, {kind}"


def _norms(facts: Description) -> Iterable[str]:
    if not facts.layers:
        return
    rows = [("layer", "r", "effective", "in -> out", "norm of the update")]
    longest = max(len(layer.path) + len(layer.sizes) for layer in facts.layers)
    bar = min(_BAR, max(_LEAST_BAR, _WIDTH - longest - _BESIDE_BAR))
    most = max((layer.norm for layer in facts.layers if math.isfinite(layer.norm)), default=0.0)
    for layer in facts.layers:
        share = layer.norm / most if most and math.isfinite(layer.norm) else 0.0
        rows.append(
            (
                layer.path or "(the model itself)",
                str(layer.r),
                "-" if layer.effective_rank is None else f"{layer.effective_rank:.1f}",
                layer.sizes,
                f"{layer.norm:<10.4g} {'#' * math.ceil(bar * share)}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        yield "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()


def _tail(path: str) -> str:
    return path.rsplit(".", 1)[-1] or "(the model itself)"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
