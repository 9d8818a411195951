"""The adapters that are computed with, opened and checked against each other."""

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.base_check import of_tied
from hf_lora.adapter_io.save import save_state
from hf_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    ConfigError,
    listing,
)
from hf_lora.files.fingerprint import Fingerprint, difference, from_json, without_rows
from hf_lora.files.read import AdapterFolder, read_folder
from hf_lora.hub.download import locate
from hf_lora.model.registry import registry_of
from hf_lora.text import show, some

Source = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter that is computed with."""

    name: str
    """As it was given, for people."""

    folder: AdapterFolder
    weight: float = 1.0

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of its base, if it has one that can be read."""
        content = (self.folder.header or {}).get("fingerprint")
        return from_json(content) if isinstance(content, dict) else None


def weighed(
    adapters: Source | Iterable[Source] | Mapping[Any, float], weights: Sequence[float] | None
) -> list[tuple[Source, float]]:
    """Return each adapter's source with its weight, in order.

    Raises:
        ConfigError: There is none, there are more or fewer weights, or one is no finite number.
    """
    if isinstance(adapters, (str, os.PathLike)):
        adapters = [adapters]
    if isinstance(adapters, Mapping) and weights is not None:
        raise ConfigError("The weights are given twice: in the mapping of adapters and as weights=")
    named = list(adapters)
    given: Any = list(adapters.values()) if isinstance(adapters, Mapping) else weights
    given = given.tolist() if hasattr(given, "tolist") else given  # an array or a tensor
    numbers = [1.0] * len(named) if given is None else list(given)
    problems = [] if named else ["no adapter is named"]
    if len(numbers) != len(named):
        problems.append(f"there are {len(named)} adapters and {len(numbers)} weights")
    problems += [
        f"{show(number)} is no finite weight"
        for number in numbers
        if isinstance(number, bool)
        or not isinstance(number, (int, float))
        or not math.isfinite(number)
    ]
    if not problems and named and not any(numbers):
        problems.append("every weight is zero, so that nothing is left")
    if problems:
        raise ConfigError(listing("These cannot be combined", problems))
    return [(name, float(number)) for name, number in zip(named, numbers, strict=True)]


@contextlib.contextmanager
def opened(
    sources: Iterable[tuple[Source, float]],
    *,
    model: nn.Module | None,
    token: str | bool | None,
) -> Iterator[list[Adapter]]:
    """Have adapters open for as long as a block lasts: folders, repos, or names on a model.

    Raises:
        AdapterFileError, HubError: As for :func:`hf_lora.load`.
    """
    held = set() if model is None else set(registry_of(model).adapters)
    with tempfile.TemporaryDirectory(prefix="hf-lora-") as inside:
        found = []
        for number, (source, weight) in enumerate(sources):
            if isinstance(source, str) and source in held:
                assert model is not None
                (folder,) = save_state(model, Path(inside, str(number)), adapter=source)
            else:
                folder = locate(source, token=token)
            found.append(Adapter(os.fspath(source), read_folder(folder), weight))
        yield found


def check_bases(adapters: Sequence[Adapter]) -> None:
    """Compare the bases that adapters were trained on, by their fingerprints or their names.

    Raises:
        BaseMismatchError: They are not the same, as far as the files tell.
    """
    lines = []
    for other in adapters[1:]:
        lines += _base_differences(adapters[0], other)
    if lines:
        raise BaseMismatchError(
            listing(
                "These adapters were trained on different bases",
                lines,
                "What each has learned is about its own base. Pass check_base=False if you know "
                "that they are the same.",
            )
        )


def _base_differences(one: Adapter, other: Adapter) -> list[str]:
    there, here = one.fingerprint, other.fingerprint
    names = () if there is None or here is None else there.samples.keys() & here.samples.keys()
    if there is None or here is None or not names:
        bases = one.folder.base, other.folder.base
        if None in bases or bases[0] == bases[1]:
            return []
        return [f"{one.name} names {show(bases[0])}, and {other.name} {show(bases[1])}"]
    rows: dict[str, set[int]] = {}
    for adapter, held in ((one, there), (other, here)):
        own = adapter.folder.rows.items()
        ids = {".".join(filter(None, (path, "weight"))): each.ids for path, each in own}
        for name, numbers in of_tied(ids, held.ties).items():
            rows.setdefault(name, set()).update(numbers)
    grown = there.vocabulary != here.vocabulary
    found = []
    for name in sorted(names):
        first, second = there.samples[name], here.samples[name]
        if first.shape != second.shape:
            if not (grown and first.shape[1:] == second.shape[1:]):
                found.append(f"{name} has shape {first.shape} for one and {second.shape} for other")
            continue
        if first.values is None or second.values is None:
            continue
        numbers = first.values, second.values
        was, is_now = (without_rows(v, first.shape, rows.get(name, ())) for v in numbers)
        fault = difference(was, is_now, first.quantized or second.quantized)
        if fault:
            found.append(f"{name}: {fault}")
    return [f"{one.name} and {other.name}: {line}" for line in found]


def check_layers(adapters: Sequence[Adapter]) -> None:
    """Check that what adapters have under one name is for one layer, and can be computed with.

    Raises:
        AdapterMismatchError: The layers differ in kind, size or name; all of it is named.
    """
    problems = []
    seen: dict[str, Adapter] = {}
    for adapter in adapters:
        for path, held in adapter.folder.factors.items():
            if held.layout.split is None:
                roles = ", ".join(held.layout.roles)
                problems.append(
                    f"{adapter.name} has {roles} on {path}, which are no factors of a product"
                )
                continue
            first = seen.setdefault(path, adapter)
            fault = None if first is adapter else _layer_fault(first, adapter, path)
            if fault:
                problems.append(f"{path}: the layers of {first.name} and {adapter.name} {fault}")
    for i, one in enumerate(adapters):
        problems += [line for other in adapters[i + 1 :] if (line := _other_names(one, other))]
    if problems:
        raise AdapterMismatchError(
            listing("These adapters cannot be computed with together", problems)
        )


def _layer_fault(one: Adapter, other: Adapter, path: str) -> str | None:
    there, here = one.folder.factors[path], other.folder.factors[path]
    if here.layout is not there.layout:
        return "are of different kinds"
    sizes = _widths(one, path), _widths(other, path)
    if any(sizes[0][part] != sizes[1][part] for part in sizes[0].keys() & sizes[1].keys()):
        return f"differ: {there.layout.sizes(there.shapes)} and {here.layout.sizes(here.shapes)}"
    return None


def _widths(adapter: Adapter, path: str) -> dict[str, tuple[int, ...]]:
    """Return for each part (E, O, I), which the rank does not change."""
    held = adapter.folder.factors[path]
    blank = {role: torch.empty(shape, device="meta") for role, shape in held.shapes.items()}
    assert held.layout.split is not None
    found = held.layout.split(blank, adapter.folder.slots[path])
    return {part: (*p.left.shape[:2], p.right.shape[2]) for part, p in found.items()}


def _other_names(one: Adapter, other: Adapter) -> str | None:
    """Return a line if two adapters seem to name the same layers from different tops, or None."""
    ours, theirs = set(one.folder.factors), set(other.folder.factors)
    if ours & theirs:
        return None
    for a in ours:
        b = next((b for b in theirs if a.endswith(f".{b}") or b.endswith(f".{a}")), None)
        if b is not None:
            return (
                f"{one.name} calls {show(a)} what {other.name} may call {show(b)}: one was saved "
                "from a part of the other's model; load both onto one model and pass model="
            )
    return None


def not_finite(adapter: Adapter, keys: Iterable[str]) -> AdapterFileError:
    """Return the error for numbers in a file that cannot be computed with."""
    return AdapterFileError(f"{adapter.name} holds numbers that are not finite: {some(keys)}")
