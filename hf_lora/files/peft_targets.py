"""Which layers of a model an ``adapter_config.json`` promises, as PEFT would choose them."""

from collections.abc import Collection, Mapping
from typing import Any

from hf_lora.errors import AdapterFileError
from hf_lora.files.bounded_regex import Budget, Pattern, Text
from hf_lora.files.patterns import LayerIndex, TailIndex
from hf_lora.files.peft_format import read_names, weights_named
from hf_lora.kinds.experts import PARTS
from hf_lora.text import show

_ALL_LINEAR = "all-linear"
TARGET_FIELDS = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
"""The fields that decide."""


def promised_layers(
    fields: Mapping[str, Any], names: Collection[str], source: str, patience: Budget
) -> set[str]:
    """Return those of a model's linear layers that PEFT would adapt.

    ``"all-linear"`` gives all of them, the output head included: PEFT leaves that out, but
    what it takes for the head depends on the task.

    Args:
        fields: The parsed ``adapter_config.json``.
        names: The layers, under the names that they had where the file was made.
        source: What to name in errors.
        patience: What matching the file's patterns may still cost.

    Raises:
        AdapterFileError: A field is senseless, or its patterns take too long.
    """
    index = TailIndex(weights_named(fields, source))
    own = ("weight", *PARTS)
    by_weight = {name for name in names if any(index.means(f"{name}.{part}") for part in own)}
    return by_weight | _by_module(fields, names, source, patience)


def says_no_target(fields: Mapping[str, Any]) -> bool:
    """Say whether the file leaves open which layers are meant: PEFT has a table of models then."""
    return fields.get("target_modules") is None and not fields.get("target_parameters")


def _by_module(
    fields: Mapping[str, Any], names: Collection[str], source: str, patience: Budget
) -> set[str]:
    targets = fields.get("target_modules") or []
    if isinstance(targets, str):
        meant = _by_pattern(targets, names, patience)
        return meant - _excluded(fields, meant, source, patience)
    index = TailIndex(read_names(targets, "target_modules", source))
    meant = {name for name in names if index.means(name)}
    layers = _layers(fields, source, patience)
    if layers is not None:
        # PEFT does not ask for the layer where a target is the whole name
        meant = {name for name in meant if name in index.names or layers.means(name)}
    return meant - _excluded(fields, meant, source, patience)


def says_all_linear(fields: Mapping[str, Any]) -> bool:
    """Say whether the target is every linear layer."""
    targets = fields.get("target_modules")
    return isinstance(targets, str) and targets.lower() == _ALL_LINEAR


def _by_pattern(text: str, names: Collection[str], patience: Budget) -> set[str]:
    if text.lower() == _ALL_LINEAR:
        return set(names)
    pattern = Pattern(text, patience)
    return {name for name in names if pattern.fullmatch(Text(name, patience))}


def _excluded(
    fields: Mapping[str, Any], names: Collection[str], source: str, patience: Budget
) -> set[str]:
    excluded = fields.get("exclude_modules")
    if not excluded:
        return set()
    if isinstance(excluded, str):
        pattern = Pattern(excluded, patience)
        return {name for name in names if pattern.fullmatch(Text(name, patience))}
    index = TailIndex(read_names(excluded, "exclude_modules", source))
    return {name for name in names if index.means(name)}


def _layers(fields: Mapping[str, Any], source: str, patience: Budget) -> LayerIndex | None:
    numbers = fields.get("layers_to_transform")
    if numbers is None or numbers == []:
        return None
    numbers = numbers if isinstance(numbers, list) else [numbers]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise AdapterFileError(
            f"{source}: layers_to_transform is {show(numbers)}, not a list of whole numbers"
        )
    names = fields.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else read_names(names, "layers_pattern", source)
    return LayerIndex(numbers, names, patience)
