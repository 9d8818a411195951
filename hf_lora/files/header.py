"""What hf_lora writes into the weights' header, so that the one file is complete."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_lora.config import LoRAConfig
from hf_lora.errors import AdapterFileError, ConfigError, UnsupportedAdapterError, listing
from hf_lora.files.data import AdapterData
from hf_lora.files.labels import LABELS
from hf_lora.files.patterns import SPECIAL
from hf_lora.files.peft_format import WEIGHT_TYING
from hf_lora.files.safe_json import is_number, parse_json
from hf_lora.files.token_rows import from_header, to_header
from hf_lora.kinds.experts import PARTS
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.token_rows import TokenRows
from hf_lora.text import show, some
from hf_lora.version import __version__

FORMAT = 1
HEADER_KEY = "hf_lora"
ADAPTER_CONFIG = "adapter_config"
"""The entry that repeats ``adapter_config.json``."""

BASE_CHANGED = "base_changed"
"""The entry for what makes the base another than the one that is named."""

BUFFERS = "buffers"
"""The entry that names the buffers which the training has moved, and which the file holds."""

ROWS = "rows"
"""The entry for rows of modules that are trained, and for what shares them."""

TIES = "ties"
"""The entry for tensors of which the adapter has one for several names."""

_ENTRIES = {
    ADAPTER_CONFIG,
    BASE_CHANGED,
    BUFFERS,
    "config",
    "fingerprint",
    "format",
    LABELS,
    "requires",
    ROWS,
    "slots",
    TIES,
    "trained",
}
"""What a reader of this version knows; else an entry is told and ignored, unless it is required."""

_FEATURES: dict[str, Callable[[AdapterData], bool]] = {
    "biases": lambda content: content.config.lora_bias or content.config.bias != "none",
    BUFFERS: lambda content: bool(content.buffers),
    "experts": lambda content: any(slot.parts for slot in content.slots.values()),
    ROWS: lambda content: bool(content.rows),
    "rslora": lambda content: any(slot.rslora for slot in content.slots.values()),
    TIES: lambda content: bool(content.ties),
    "trained": lambda content: bool(content.trained),
}
"""What changes an adapter's outputs, to whether an adapter has it: ``requires`` in the header.

A reader that does not know one of them would compute something else, and has to refuse the file.
"""

_CONFIG = {field.name for field in dataclasses.fields(LoRAConfig)}
_SLOT = {"r": None, "alpha": None, "dropout": 0.0, "rslora": False, "parts": [],
         "lora_bias": False, "bias": False}  # fmt: skip
"""The numbers of a slot, to what they are if the header does not say."""

_MOST_SPECIAL = 20_000
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z-]*i")
_ESCAPE = re.compile(r"\\[xuUN0-7]")


@dataclasses.dataclass(frozen=True)
class OwnHeader:
    """The checked content of our part of a header."""

    fields: dict[str, Any]
    """As in ``adapter_config.json``."""

    config: LoRAConfig
    slots: dict[str, LayerConfig]
    trained: list[str]
    buffers: list[str]
    rows: dict[str, TokenRows]
    ties: dict[str, str]
    """Name of a tensor to that of the one that it is."""

    raw: dict[str, Any]
    """All of it, as parsed."""

    told: list[str]
    """What a newer hf_lora wrote and this one ignores, a line each."""


def make_header(content: AdapterData, fields: Mapping[str, Any]) -> str:
    """Return our part of the header, ``fields`` being what ``adapter_config.json`` says."""
    entries = {
        ADAPTER_CONFIG: fields,
        "config": content.config.to_dict(),
        "fingerprint": content.fingerprint,
        "format": FORMAT,
        "requires": sorted(name for name, used in _FEATURES.items() if used(content)),
        "slots": {path: _entry(slot) for path, slot in content.slots.items()},
        "trained": list(content.trained),
    }
    if content.base_changed:
        entries[BASE_CHANGED] = content.base_changed
    if content.buffers:
        entries[BUFFERS] = sorted(content.buffers)
    if content.labels is not None:
        entries[LABELS] = content.labels
    if content.rows:
        entries[ROWS] = to_header(content.rows)
    if content.ties:
        entries[TIES] = content.ties
    return json.dumps(entries)


def read_header(metadata: Mapping[str, str], path: Path) -> OwnHeader | None:
    """Read our part of a header; None if the file was made elsewhere.

    The header may grow: what an older hf_lora did not write has its default, and what a newer one
    writes beyond this one's knowledge is told, unless ``requires`` says that it cannot be ignored.

    Raises:
        UnsupportedAdapterError: It was written by a newer hf_lora, and needs that.
        AdapterFileError: It is damaged.
    """
    text = metadata.get(HEADER_KEY)
    if text is None:
        return None
    # json.loads lets lone halves of characters through, which no file can hold again
    raw = parse_json(text.encode("utf-8", "replace"), f"{path}: hf_lora's part of the header")
    version = raw.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT:
        raise UnsupportedAdapterError(
            f"{path} has format {show(version)}; this hf_lora reads up to {FORMAT}. Upgrade it."
        )
    damaged = f"{path}: hf_lora's part of the header is damaged"
    _check_required(raw.get("requires", []), path, damaged)
    fields, config, slots = (raw.get(name) for name in (ADAPTER_CONFIG, "config", "slots"))
    trained = raw.get("trained", [])
    rows = from_header(raw.get(ROWS, {}))
    if not isinstance(fields, dict) or not isinstance(slots, dict) or not (slots or rows):
        raise AdapterFileError(damaged)
    buffers, ties = raw.get(BUFFERS, []), raw.get(TIES, {})
    for names in (trained, buffers):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AdapterFileError(damaged)
    if not isinstance(config, dict) or not _are_ties(ties) or rows is None:
        raise AdapterFileError(damaged)
    _check_patterns(config, damaged)
    known = {name: value for name, value in config.items() if name in _CONFIG}
    try:
        checked = LoRAConfig.from_dict(known)
    except (ConfigError, TypeError, OverflowError) as error:
        raise AdapterFileError(f"{path}: the configuration in the header: {error}") from error
    numbers = {name: _slot(entry, f"{damaged}: {show(name)}") for name, entry in slots.items()}
    torn = [name for name, slot in numbers.items() if slot.rslora != checked.rslora]
    if torn:  # a save writes the one and the other, and nothing could load that
        raise AdapterFileError(f"{damaged}: rslora is {checked.rslora}, but not of {some(torn)}")
    return OwnHeader(
        fields=fields,
        config=checked,
        slots=numbers,
        trained=trained,
        buffers=buffers,
        rows=rows,
        ties=ties,
        raw=raw,
        told=_unknown(raw, config, slots),
    )


def contradictions(
    own: OwnHeader,
    fields: Mapping[str, Any],
    slots: Mapping[str, LayerConfig],
    trained_names: list[str],
) -> list[str]:
    """Return a line for each thing that decides the mathematics and is said in two ways.

    Args:
        own: The header.
        fields: The parsed ``adapter_config.json``.
        slots: What follows from that and the tensors.
        trained_names: Likewise.
    """
    problems = []
    for path in sorted(own.slots.keys() | slots.keys()):
        there, here = own.slots.get(path), slots.get(path)
        if there is None or here is None:
            problems.append(
                f"{path} {'has no tensors' if here is None else 'is not in the header'}"
            )
            continue
        problems += [
            f"{path}: {name} = {getattr(here, name)!r}, in the header {getattr(there, name)!r}"
            for name in ("r", "alpha", "rslora", "parts", "lora_bias", "bias")
            if getattr(here, name) != getattr(there, name)
        ]
    then = own.fields.get("modules_to_save") or []
    if not isinstance(then, list) or set(trained_names) != {*map(str, then)}:
        problems.append(f"modules_to_save = {show(trained_names)}, in the header {show(then)}")
    asked = fields.get(WEIGHT_TYING) or False, own.fields.get(WEIGHT_TYING) or False
    if asked[0] != asked[1]:
        problems.append(f"{WEIGHT_TYING} = {show(asked[0])}, in the header {show(asked[1])}")
    return problems


def _are_ties(ties: Any) -> bool:
    """Say whether an entry is one step from names to names, none of which leads on."""
    if not isinstance(ties, dict) or not all(isinstance(to, str) for to in ties.values()):
        return False
    return ties.keys().isdisjoint(ties.values())


def _check_required(required: Any, path: Path, damaged: str) -> None:
    """Refuse what cannot be computed here, by the names that a newer hf_lora gave it."""
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise AdapterFileError(damaged)
    unknown = [show(name) for name in required if name not in _FEATURES]
    if unknown:
        raise UnsupportedAdapterError(
            listing(
                f"{path} needs what this hf_lora ({__version__}) does not know",
                unknown,
                "Upgrade hf_lora.",
            )
        )


def _unknown(raw: dict[str, Any], config: dict[str, Any], slots: dict[str, Any]) -> list[str]:
    """Return one line about the entries that a newer hf_lora wrote, none if there are none."""
    names = [
        *(name for name in raw if name not in _ENTRIES),
        *(f"config.{name}" for name in config if name not in _CONFIG),
        *{f"slots.{name}": None for slot in slots.values() for name in slot if name not in _SLOT},
    ]
    if not names:
        return []
    return [f"entries of the header that this hf_lora does not know were ignored: {some(names)}"]


def _check_patterns(config: dict[str, Any], damaged: str) -> None:
    """Refuse patterns that would take long to compile, which a configuration does with all.

    Plain names cost little. Sets of characters cost thousands of times their length, and millions
    where case is ignored.
    """
    texts = [text for text in config.values() if isinstance(text, str)]
    for value in config.values():
        if isinstance(value, (list, dict)):
            texts += [text for text in value if isinstance(text, str)]
    special = [text for text in texts if SPECIAL.search(text.replace("\\.", "."))]
    wide = [
        t for t in special if _IGNORES_CASE.search(t) and (_ESCAPE.search(t) or not t.isascii())
    ]
    if wide or sum(map(len, special)) > _MOST_SPECIAL:
        raise AdapterFileError(f"{damaged}: its patterns would take too long to compile")


def _entry(slot: LayerConfig) -> dict[str, Any]:
    entry = dataclasses.asdict(slot)
    for name in ("parts", "lora_bias", "bias"):
        if not entry[name]:
            del entry[name]
    return entry


def _slot(entry: Any, damaged: str) -> LayerConfig:
    if not isinstance(entry, dict):
        raise AdapterFileError(damaged)
    r, alpha, dropout, rslora, parts, *biases = (entry.get(n, d) for n, d in _SLOT.items())
    sound = (
        isinstance(r, int)
        and all(is_number(value) for value in (r, alpha, dropout))
        and (r >= 1 and alpha > 0 and 0 <= dropout < 1)
        and all(isinstance(flag, bool) for flag in (rslora, *biases))
        and isinstance(parts, list)
        and all(part in PARTS for part in parts)
        and len(set(parts)) == len(parts)
    )
    if not sound:
        raise AdapterFileError(damaged)
    lora_bias, bias = biases
    return LayerConfig(r, float(alpha), float(dropout), rslora, lora_bias, bias, tuple(parts))
