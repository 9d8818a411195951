"""PEFT's ``adapter_config.json``: written from a :class:`Content`, and understood or refused.

The only place that spells PEFT's field names. Read as of PEFT 0.21.
"""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

from hf_lora.errors import AdapterFileError, UnsupportedAdapterError, listing
from hf_lora.files.content import Content
from hf_lora.files.patterns import Patience, TailIndex
from hf_lora.layers.base import Slot

PREFIX = "base_model.model."

# Fields that change the mathematics and that hf_lora does not implement, with the values for off.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "arrow_config": (None, {}),
    "velora_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "megatron_config": (None, {}),
}
# Starts that change the base's weights: the file then is no update of the base that it names.
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq", "mica")
# Fields that say nothing about the result.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config",
    "alpha_pattern", "rank_pattern", "r", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip


def to_peft(content: Content) -> dict[str, Any]:
    """Return the fields of ``adapter_config.json``: what readers require and what differs."""
    r = _most_common(slot.r for slot in content.slots.values())
    alpha = _most_common(slot.alpha for slot in content.slots.values())
    return {
        "alpha_pattern": _exceptions({p: s.alpha for p, s in content.slots.items()}, alpha),
        "base_model_name_or_path": content.base,
        "bias": "none",
        "fan_in_fan_out": content.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        "lora_dropout": content.config.dropout,
        "modules_to_save": content.trained_names or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": _exceptions({p: s.r for p, s in content.slots.items()}, r),
        "revision": content.revision,
        "target_modules": content.target_names,
        "task_type": content.task,
        "use_dora": False,
        "use_rslora": content.config.rslora,
    }


def check_supported(fields: Mapping[str, Any], source: str) -> list[str]:
    """Check that an adapter is LoRA as hf_lora knows it.

    Returns:
        Fields that are set and that nobody here knows; PEFT ignores such fields as well.

    Raises:
        UnsupportedAdapterError: Another method, or a feature that is not implemented; all named.
    """
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapterError(
            f"{source}: peft_type is {kind!r}; hf_lora reads adapters of type 'LORA' only."
        )
    problems = [
        f"{name} = {fields[name]!r}"
        for name, off in _UNSUPPORTED.items()
        if name in fields and not any(_same(fields[name], value) for value in off)
    ]
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_BASE_CHANGING):
        problems.append(
            f"init_lora_weights = {start!r}: the file belongs to a base whose weights were changed;"
            " in PEFT, save it with path_initial_model_for_weight_conversion"
        )
    if problems:
        raise UnsupportedAdapterError(
            listing(f"{source} uses features of PEFT that hf_lora does not implement", problems)
        )
    known = _HARMLESS | _UNSUPPORTED.keys()
    return [name for name, value in fields.items() if name not in known and value]


def read_slots(fields: Mapping[str, Any], ranks: Mapping[str, int], source: str) -> dict[str, Slot]:
    """Return each layer's numbers, from the configuration and the tensors' own ranks.

    Args:
        fields: The parsed ``adapter_config.json``.
        ranks: Path of each layer in the file to the rank that its tensors have.
        source: What to name in errors.

    Raises:
        AdapterFileError: A number is missing or senseless, or ``r`` contradicts the tensors.
    """
    problems: list[str] = []
    r = _number(fields, "r", 8, problems, whole=True)
    alpha = _number(fields, "lora_alpha", 8, problems)
    dropout = fields.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout is {dropout!r}, not a probability in [0, 1)")
    rslora = fields.get("use_rslora") or False
    if not isinstance(rslora, bool):
        problems.append(f"use_rslora is {rslora!r}, not true or false")
    rank_pattern = _pattern_map(fields, "rank_pattern", problems, whole=True)
    alpha_pattern = _pattern_map(fields, "alpha_pattern", problems)
    if problems:
        raise AdapterFileError(listing(f"{source} cannot be used", problems))

    patience = Patience(source)
    slots: dict[str, Slot] = {}
    for path, rank in ranks.items():
        pattern = patience.first_tail(rank_pattern, path)
        said = r if pattern is None else rank_pattern[pattern]
        if said != rank:
            problems.append(f"{path}: the configuration says r={said}, the tensors have {rank}")
        pattern = patience.first_tail(alpha_pattern, path)
        strength = alpha if pattern is None else alpha_pattern[pattern]
        slots[path] = Slot(r=rank, alpha=float(strength), dropout=float(dropout), rslora=rslora)
    if problems:
        raise AdapterFileError(listing(f"{source} contradicts its weights", problems))
    return slots


def expected_layers(
    fields: Mapping[str, Any], linear: Iterable[str], head: Iterable[str], source: str
) -> set[str] | None:
    """Return the paths of a model's linear layers that ``target_modules`` means, or None if unsaid.

    Args:
        fields: The parsed ``adapter_config.json``.
        linear: Paths of the model's layers that could be adapted.
        head: Those of them that belong to the output head.
        source: What to name in errors.
    """
    targets = fields.get("target_modules")
    if targets is None:
        return None
    patience = Patience(source)
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            meant = set(linear) - set(head)
        else:
            meant = {path for path in linear if patience.fullmatch(targets, path)}
    else:
        index = TailIndex(_names(targets, "target_modules", source))
        meant = {path for path in linear if index.means(path)}
        meant = _only_layers(meant, fields, patience, source)
    excluded = fields.get("exclude_modules")
    if isinstance(excluded, str):
        meant = {path for path in meant if not patience.fullmatch(excluded, path)}
    elif excluded:
        index = TailIndex(_names(excluded, "exclude_modules", source))
        meant = {path for path in meant if not index.means(path)}
    return meant


def read_trained_names(fields: Mapping[str, Any], source: str) -> list[str]:
    """Return the names of the modules that were trained in full."""
    return _names(fields.get("modules_to_save") or [], "modules_to_save", source)


def _only_layers(
    meant: set[str], fields: Mapping[str, Any], patience: Patience, source: str
) -> set[str]:
    indexes = fields.get("layers_to_transform")
    if indexes is None or indexes == []:
        return meant
    wanted = {indexes} if isinstance(indexes, int) else set(indexes)
    patterns = fields.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    kept = set()
    for path in meant:
        parts = path.split(".")
        for position in range(1, len(parts) - 1):
            if parts[position].isdigit() and any(
                patience.fullmatch(pattern, parts[position - 1]) for pattern in patterns
            ):
                if int(parts[position]) in wanted:
                    kept.add(path)
                break
    return kept


def _exceptions(values: dict[str, Any], common: Any) -> dict[str, Any]:
    """Return the shortest names that give PEFT the values that differ from the common one."""
    by_tail: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_tail.setdefault(path.rsplit(".", 1)[-1], set()).add(value)
    named = {
        tail if len(by_tail[tail]) == 1 else path: value
        for path, value in values.items()
        for tail in [path.rsplit(".", 1)[-1]]
        if value != common
    }
    # PEFT takes the first entry that matches a tail of a path, so longer names come first
    ordered = sorted(named, key=lambda name: (-name.count("."), name))
    return {name: _plain(named[name]) for name in ordered}


def _most_common(values: Iterable[Any]) -> Any:
    counts = collections.Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _plain(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _pattern_map(
    fields: Mapping[str, Any], name: str, problems: list[str], *, whole: bool = False
) -> dict[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        problems.append(f"{name} is {value!r}, not a map of pattern to number")
        return {}
    return {pattern: _number(value, pattern, None, problems, whole=whole) for pattern in value}


def _number(
    fields: Mapping[str, Any], name: str, default: Any, problems: list[str], *, whole: bool = False
) -> Any:
    value = fields.get(name, default)
    fine = _is_number(value) and math.isfinite(value) and value > 0
    if not fine or (whole and not isinstance(value, int)):
        problems.append(f"{name} is {value!r}, not a {'whole ' if whole else ''}number above 0")
    return value


def _names(value: Any, field: str, source: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AdapterFileError(f"{source}: {field} is {value!r}, not a list of names")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other
