"""PEFT's ``adapter_config.json``: written from a :class:`AdapterData`, and understood or refused.

With ``peft_targets`` the only place that spells PEFT's field names. Read as of PEFT 0.21.
"""

import collections
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from hf_lora.errors import AdapterFileError, UnsupportedAdapterError, listing
from hf_lora.files.attention import without_outs
from hf_lora.files.bounded_regex import Budget
from hf_lora.files.data import AdapterData
from hf_lora.files.patterns import SPECIAL, PatternMap, TailIndex, tails
from hf_lora.files.safe_json import is_number
from hf_lora.files.token_rows import FIELD, NO_TARGET
from hf_lora.files.token_rows import to_peft as rows_to_peft
from hf_lora.kinds.experts import PARTS
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.text import show

# Fields that change the mathematics and that hf_lora does not implement, with the values for off.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "arrow_config": (None, {}),
    "velora_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "megatron_config": (None, {}),
}
# Starts that change the base's weights: the file then is no update of the base that it names.
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")
# What may be said of the base's biases.
_BIASES = ("none", None, "all", "lora_only")
# Fields that say nothing about the result, or that are read elsewhere.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type", FIELD, "use_rslora",
}  # fmt: skip
# What a configuration is reduced to, beside its numbers.
_SAID_PLAINLY = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "layers_pattern", "layers_to_transform", "lora_bias", "lora_dropout", "modules_to_save",
    "revision", "target_modules", "target_parameters", "task_type", FIELD, "ensure_weight_tying",
}  # fmt: skip
# The names by which PEFT knows embeddings, and that it ties on request.
_EMBEDDINGS = ("embed_tokens", "lm_head")

WEIGHT_TYING = "ensure_weight_tying"
"""The field that asks PEFT to keep tied embeddings tied."""

ORIGIN_FIELDS = ("auto_mapping", "base_model_name_or_path", "revision", "task_type")
"""The fields that say what an adapter was made for."""


def to_peft(content: AdapterData) -> dict[str, Any]:
    """Return the fields of ``adapter_config.json``: what readers ask for, and what differs.

    What is at its default is left out: PEFT before 0.9 stops at the first field that it does not
    know. The exceptions are in all of its versions, and readers fail without them.
    """
    said = without_outs(content.slots)
    r = _most_common((slot.r for slot in said.values()), content.config.r)
    alpha = _most_common((slot.alpha for slot in said.values()), content.config.alpha)
    by_weight = set(content.by_weight)
    stacked = [f"{path}.{part}" for path, slot in content.slots.items() for part in slot.parts]
    slots = {name: slot for path, slot in said.items() for name in _names_at(path, slot, by_weight)}
    asked_for = {
        "base_model_name_or_path": content.base,
        "bias": content.config.bias,
        "fan_in_fan_out": content.fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": _plain(alpha),
        "peft_type": "LORA",
        "r": r,
        "target_modules": content.target_names if content.slots else NO_TARGET,
    }
    different = {
        "alpha_pattern": _exceptions({name: slot.alpha for name, slot in slots.items()}, alpha),
        "auto_mapping": content.auto_mapping,
        WEIGHT_TYING: content.pefts_tie,
        "lora_bias": content.config.lora_bias,
        # PEFT has none on parameters
        "lora_dropout": 0.0 if by_weight or stacked else content.config.dropout,
        "modules_to_save": content.trained_names,
        "rank_pattern": _exceptions({name: slot.r for name, slot in slots.items()}, r),
        "revision": content.revision,
        "target_parameters": [*(f"{path}.weight" for path in content.by_weight), *stacked],
        "task_type": content.task,
        FIELD: rows_to_peft(content.rows, content.row_names),
        "use_rslora": content.config.rslora,
    }
    return asked_for | {name: value for name, value in different.items() if value}


def plain_fields(
    fields: Mapping[str, Any], slots: Mapping[str, LayerConfig], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Return a configuration that says the same without what only newer readers know.

    What is at its default is left out, and so is what readers do without; the updates are scaled by
    alpha / r, also where the adapter is rank-stabilized.

    Args:
        fields: A configuration that was read and checked.
        slots: Path of each layer to its numbers.
        ranks: The same to the rank that its factors are given.
    """
    by_weight = TailIndex(weights_named(fields, "the configuration"))
    said = {}
    for path, slot in without_outs(slots).items():
        kept = not slot.rslora and ranks[path] == slot.r
        alpha = slot.alpha if kept else slot.scaling * ranks[path]
        names = _names_at(path, slot, [path] if by_weight.means(f"{path}.weight") else [])
        said |= dict.fromkeys(names, (ranks[path], alpha))
    r = _most_common((rank for rank, _ in said.values()), fields.get("r", 8))
    alpha = _most_common((alpha for _, alpha in said.values()), fields.get("lora_alpha", 8))
    set_ = {name: fields[name] for name in sorted(_SAID_PLAINLY & fields.keys()) if fields[name]}
    numbers = {
        "alpha_pattern": _exceptions({name: alpha for name, (_, alpha) in said.items()}, alpha),
        "rank_pattern": _exceptions({name: rank for name, (rank, _) in said.items()}, r),
    }
    return {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": _plain(alpha),
        "peft_type": "LORA",
        "r": r,
        **set_,
        **{name: value for name, value in numbers.items() if value},
    }


def check_supported(fields: Mapping[str, Any], source: str) -> list[str]:
    """Check that an adapter is LoRA as hf_lora knows it.

    Returns:
        Fields that are set and that nobody here knows; PEFT ignores such fields as well.

    Raises:
        UnsupportedAdapterError: Another method, or a feature that is not implemented; all named.
        AdapterFileError: A field that should be a name is something else.
    """
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapterError(
            f"{source}: peft_type is {show(kind)}; hf_lora reads adapters of type 'LORA' only."
        )
    problems = [
        f"{name} = {show(fields[name])}"
        for name, off in _UNSUPPORTED.items()
        if name in fields and not any(_same(fields[name], value) for value in off)
    ]
    if not any(_same(fields.get("bias"), value) for value in _BIASES):
        problems.append(f"bias = {show(fields['bias'])}")
    named = weights_named(fields, source)
    other = [n for n in named if n.rsplit(".", 1)[-1] not in ("weight", *PARTS)]
    if other:
        problems.append(f"target_parameters = {show(other)}")
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        problems.append(
            f"init_lora_weights = {show(start)}: the file belongs to a base whose weights were "
            "changed; in PEFT, save it with path_initial_model_for_weight_conversion"
        )
    if problems:
        raise UnsupportedAdapterError(
            listing(f"{source} uses features of PEFT that hf_lora does not implement", problems)
        )
    for name in ("base_model_name_or_path", "revision", "task_type"):
        if not isinstance(fields.get(name), (str, type(None))):
            raise AdapterFileError(f"{source}: {name} is {show(fields[name])}, not a name")
    known = _KNOWN | _UNSUPPORTED.keys()
    return [name for name, value in fields.items() if name not in known and value]


def names_embeddings(names: Iterable[str]) -> bool:
    """Say whether PEFT, asked to keep ties, sees that modules of these names are embeddings."""
    return any(name.rpartition(".")[2] in _EMBEDDINGS for name in names)


def read_tying(fields: Mapping[str, Any], adapted: Iterable[str], source: str) -> bool:
    """Return whether PEFT is asked to have one copy of what is tied to the input embeddings.

    Args:
        fields: The parsed ``adapter_config.json``.
        adapted: Paths of the layers that have factors.
        source: What to name in errors.

    Raises:
        UnsupportedAdapterError: PEFT applies factors twice: to a tied pair, as one.
        AdapterFileError: Neither true nor false.
    """
    said = fields.get(WEIGHT_TYING) or False
    if not isinstance(said, bool):
        raise AdapterFileError(f"{source}: {WEIGHT_TYING} is {show(said)}, not true or false")
    tied = [path for path in adapted if any(part in _EMBEDDINGS for part in path.split("."))]
    if said and tied:
        raise UnsupportedAdapterError(
            listing(f"{source}: {WEIGHT_TYING} is set, and these may be tied", tied)
        )
    return said


def read_slots(
    fields: Mapping[str, Any],
    ranks: Mapping[str, int | None],
    source: str,
    patience: Budget,
    parts: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> dict[str, LayerConfig]:
    """Return each layer's numbers, from the configuration and the tensors' own ranks.

    Args:
        fields: The parsed ``adapter_config.json``.
        ranks: Path of each layer in the file to the rank that its tensors have, if they tell.
        source: What to name in errors.
        patience: What matching the file's patterns may still cost.
        parts: Path of each layer of experts to those of its parameters that have tensors.

    Raises:
        AdapterFileError: A number is missing or senseless, or ``r`` contradicts the tensors.
    """
    problems: list[str] = []
    r = _number(fields, "r", 8, problems, whole=True)
    alpha = _number(fields, "lora_alpha", 8, problems)
    dropout = fields.get("lora_dropout", 0.0)
    if not is_number(dropout) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout is {show(dropout)}, not a probability in [0, 1)")
    rslora = fields.get("use_rslora") or False
    if not isinstance(rslora, bool):
        problems.append(f"use_rslora is {show(rslora)}, not true or false")
    by_pattern = [
        _pattern_map(fields, "rank_pattern", problems, whole=True),
        _pattern_map(fields, "alpha_pattern", problems),
    ]
    if problems:
        raise AdapterFileError(listing(f"{source} cannot be used", problems))

    rank_pattern, alpha_pattern = (PatternMap(values, patience) for values in by_pattern)
    by_weight = TailIndex(weights_named(fields, source))
    slots: dict[str, LayerConfig] = {}
    for path, rank in ranks.items():
        own = parts.get(path, ())
        name = f"{path}.weight" if by_weight.means(f"{path}.weight") else path
        names = [f"{path}.{part}" for part in own] or [name]
        numbers = [(rank_pattern.get(n, r), alpha_pattern.get(n, alpha)) for n in names]
        said, strength = numbers[0]
        if len(set(numbers)) > 1:
            problems.append(f"{path}: its parameters have other r and alpha each: {show(numbers)}")
        if rank is not None and said != rank:
            problems.append(f"{path}: the configuration says r={said}, the tensors have {rank}")
        slots[path] = LayerConfig(
            r=rank or int(said),
            alpha=float(strength),
            dropout=float(dropout),
            rslora=rslora,
            parts=own,
        )
    if problems:
        raise AdapterFileError(listing(f"{source} contradicts its weights", problems))
    return slots


def read_trained_names(fields: Mapping[str, Any], source: str) -> list[str]:
    """Return the names of the modules that were trained in full.

    Raises:
        AdapterFileError: Not a list of names.
    """
    return read_names(fields.get("modules_to_save") or [], "modules_to_save", source)


def weights_named(fields: Mapping[str, Any], source: str) -> list[str]:
    """Return the names of the weights that PEFT adapts as such, instead of the layer around them.

    Raises:
        AdapterFileError: Not a list of names.
    """
    return read_names(fields.get("target_parameters") or [], "target_parameters", source)


def read_names(value: Any, field: str, source: str) -> list[str]:
    """Return ``value`` if it is a list of names.

    Raises:
        AdapterFileError: It is something else.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise AdapterFileError(f"{source}: {field} is {show(value)}, not a list of names")
    return value


def _names_at(path: str, slot: LayerConfig, by_weight: Collection[str]) -> list[str]:
    """Return what PEFT compares its patterns with for a layer: its path, or its parameters'."""
    if slot.parts:
        return [f"{path}.{part}" for part in slot.parts]
    return [f"{path}.weight" if path in by_weight else path]


def _exceptions(values: dict[str, Any], common: Any) -> dict[str, Any]:
    """Return the shortest patterns that give PEFT the values that differ from the common one.

    PEFT takes the first entry that fits a tail of a path, so longer names come first.
    """
    if all(value == common for value in values.values()):
        return {}
    by_tail: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_tail.setdefault(path.rsplit(".", 1)[-1], set()).add(value)
    named = {
        tail if len(by_tail[tail]) == 1 else path: value
        for path, value in values.items()
        for tail in [path.rsplit(".", 1)[-1]]
        if value != common
    }
    if any(_by_longest_tail(named, path, common) != value for path, value in values.items()):
        named = values  # one path is the tail of another: say it for every layer
    ordered = sorted(named, key=lambda name: (-name.count("."), name))
    return {SPECIAL.sub(r"\\\g<0>", name): _plain(named[name]) for name in ordered}


def _by_longest_tail(named: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((named[tail] for tail in tails(path) if tail in named), default)


def _most_common(values: Iterable[Any], default: Any) -> Any:
    counts = collections.Counter(values)
    return min(counts, key=lambda value: (-counts[value], value), default=default)


def _plain(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _pattern_map(
    fields: Mapping[str, Any], name: str, problems: list[str], *, whole: bool = False
) -> dict[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        problems.append(f"{name} is {show(value)}, not a map of pattern to number")
        return {}
    wrong = [pattern for pattern in value if _number_fault(value[pattern], whole)]
    problems.extend(
        f"{name}: {show(pattern)} is {_number_fault(value[pattern], whole)}" for pattern in wrong
    )
    return value


def _number(
    fields: Mapping[str, Any], name: str, default: Any, problems: list[str], *, whole: bool = False
) -> Any:
    value = fields.get(name, default)
    fault = _number_fault(value, whole)
    if fault:
        problems.append(f"{name} is {fault}")
    return value


def _number_fault(value: Any, whole: bool) -> str | None:
    if is_number(value) and value > 0 and (isinstance(value, int) or not whole):
        return None
    return f"{show(value)}, not a {'whole ' if whole else ''}number above 0"


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other
