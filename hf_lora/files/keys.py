"""The names of tensors in an adapter file: factors told from others, wrappers' parts taken off."""

import dataclasses
import functools
import re

import torch

from hf_lora.errors import AdapterFileError, UnsupportedAdapterError, listing
from hf_lora.files.data import LayerTensors
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.kinds.table import layouts
from hf_lora.kinds.token_rows import KEY
from hf_lora.layers.names import LORA_BIAS
from hf_lora.layers.roles import Layout
from hf_lora.text import show

PREFIX = "base_model.model."

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED = re.compile("|".join(_WRAPPERS))
_BEFORE = re.compile(rf"((?:(?:module|{'|'.join(_WRAPPERS)})\.)*){re.escape(PREFIX)}")
# A training's own state has the adapter's name in it, which PEFT takes off when it saves.
_ADAPTER = r"(?:\.(?!weight$)(?P<adapter>[^.]+))?"
_TRAINED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<role>[^.]+)")
_ON_B = re.compile(r"((?:.+\.)?)lora_B((?:\.[^.]+)?)\.bias")
_BASE_LAYER = re.compile(r"(?P<path>.+)\.base_layer\.(?P<role>[^.]+)")
_ROWS = re.compile(rf"(?:(?P<path>.+)\.)?{re.escape(KEY)}(?:\.(?P<adapter>[^.]+))?")
_BELOW_ROWS = re.compile(r"(?P<path>.+)\.token_adapter\.base_layer\.(?P<role>[^.]+)")
# PEFT writes all that its wrapper of an embedding holds, beside the module trained in full itself
_WRAPPER = re.compile(r"(?P<path>.+)\.(?P<part>modules_to_save|original_module)\.(?P<role>[^.]+)")
_FOREIGN = re.compile(
    r"\blora_magnitude_vector\b|\blora_A(?:\.[^.]+)?\.bias\b"
    r"|\bvera_|\bhada_|\blokr_|\bia3_"
)


def without_wrappers(name: str) -> str:
    """Take off what torch.compile, FSDP and checkpointing put into a model's names."""
    if _WRAPPED.search(name) is None:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclasses.dataclass(frozen=True)
class SortedKeys:
    """What an adapter file's keys are."""

    factors: dict[str, LayerTensors]
    """Path of each layer to its tensors."""

    others: dict[str, str]
    """Name of every other tensor to its key; the base's own weight of an adapted layer is under
    its plain name."""

    rows: dict[str, str]
    """Path of each module of which some rows are trained, to their key."""

    originals: dict[str, str]
    """Name of a tensor of a module trained in full to the key of what the base has there."""

    renamed: list[str]
    """The parts that were taken off."""


def sort_keys(file: TensorFile) -> SortedKeys:
    """Tell layers' tensors from others, and check that those of a layer fit each other.

    Raises:
        UnsupportedAdapterError: There are tensors of other methods.
        AdapterFileError: A tensor stands twice, lacks its partner or does not fit it.
    """
    foreign = [key for key in file.shapes if _FOREIGN.search(key)]
    if foreign:
        raise UnsupportedAdapterError(
            listing(f"{file.path} holds tensors of a kind that hf_lora does not implement", foreign)
        )
    factor = _factor_pattern(layouts())
    problems: list[str] = []
    pairs: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    rows: dict[str, str] = {}
    renamed: set[str] = set()
    adapters: set[str] = set()
    for key in file.shapes:
        plain = _plain_key(key, renamed)
        found, row = factor.fullmatch(plain), _ROWS.fullmatch(plain)
        held = found or row or _TRAINED.fullmatch(plain)
        if held is not None and held["adapter"] is not None:
            adapters.add(held["adapter"])
        if found is not None:
            place, name = pairs.setdefault(found["path"] or "", {}), found["role"]
        elif row is not None:
            place, name = rows, row["path"] or ""
        else:
            inner = held or _BELOW_ROWS.fullmatch(plain)
            place, name = others, f"{inner['path']}.{inner['role']}" if inner else plain
        if name in place:
            problems.append(f"{key} and {place[name]} are the same tensor twice")
        place[name] = key
    if len(adapters) > 1:
        raise AdapterFileError(
            listing(
                f"{file.path} holds the tensors of several adapters",
                sorted(map(show, adapters)),
                "Keep those of one of them, or save each into a folder of its own.",
            )
        )
    renamed.update(f".{name}" for name in adapters - {"default"})
    factors = {}
    for path, pair in pairs.items():
        found = _layer_tensors(file, pair)
        if isinstance(found, str):
            problems.append(f"{path or 'the model itself'} {found}")
        else:
            factors[path] = found
    others, originals = _without_wrapper(_with_base_layers(others, factors, problems))
    problems += [
        f"{key} has shape {file.shapes[key]} and type {file.dtypes[key]}, and is no rows"
        for key in rows.values()
        if len(file.shapes[key]) != 2 or 0 in file.shapes[key] or not _is_wide(file.dtypes[key])
    ]
    if not pairs and not rows:
        problems.append(f"there is no {' and no '.join(layouts()[0].roles)} in it")
    if problems:
        raise AdapterFileError(listing(f"{file.path} is not a sound adapter", problems))
    return SortedKeys(factors, others, rows, originals, sorted(renamed))


@functools.cache
def _factor_pattern(known: tuple[Layout, ...]) -> re.Pattern[str]:
    every = {role for layout in known for role in (*layout.roles, *layout.beside)}
    roles = "|".join(sorted(map(re.escape, every)))
    return re.compile(rf"(?:(?P<path>.+)\.)?(?P<role>{roles}){_ADAPTER}(?:\.weight)?")


def _plain_key(key: str, renamed: set[str]) -> str:
    plain = key
    before = _BEFORE.match(key)
    if before is not None:
        plain = key[before.end() :]
        renamed.update(f"{part}." for part in before[1].split(".") if part)
    bare = without_wrappers(plain)
    if bare != plain:
        renamed.update(f"{part}." for part in plain.split(".") if part in _WRAPPERS)
    return _ON_B.sub(rf"\1{LORA_BIAS}\2", bare)


def _layer_tensors(file: TensorFile, held: dict[str, str]) -> LayerTensors | str:
    """Return the tensors of one layer, role to key, as a record; or why they are none."""
    shapes = {role: file.shapes[key] for role, key in held.items()}
    known = [each for each in layouts() if held.keys() <= {*each.roles, *each.beside}]
    if not known:
        return f"has {' and '.join(sorted(held))}, which are of different methods"
    if not held.keys() >= {*known[0].roles}:
        return f"has {next(iter(held))} but not its partner"
    # factors of linear layers and of convolutions have the same names; their shapes tell
    layout = next((each for each in known if each.fault(shapes) is None), known[0])
    roles = [role for role in (*layout.roles, *layout.beside) if role in held]
    shapes = {role: shapes[role] for role in roles}
    fault = layout.fault(shapes)
    if fault:
        return fault
    for role, key in held.items():
        dtype = file.dtypes[key]
        if not _is_wide(dtype):
            return f"has {role} of type {str(dtype).removeprefix('torch.')}"
    return LayerTensors(layout, {role: held[role] for role in roles}, shapes)


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _with_base_layers(
    others: dict[str, str], factors: dict[str, LayerTensors], problems: list[str]
) -> dict[str, str]:
    """Give the base's own tensors of adapted layers their plain names (PEFT: ``.base_layer.``)."""
    named: dict[str, str] = {}
    for name, key in others.items():
        found = _BASE_LAYER.fullmatch(name)
        if found and found["path"] in factors:
            name = f"{found['path']}.{found['role']}"
        if name in named:
            problems.append(f"{key} and {named[name]} are the same tensor twice")
        named[name] = key
    return named


def _without_wrapper(others: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Take out what PEFT's wrapper of an embedding has beside the module that it trains in full.

    Returns:
        The others, without the second key of a tensor, which PEFT itself does not read; and what
        the base had there.
    """
    left: dict[str, str] = {}
    originals: dict[str, str] = {}
    for name, key in others.items():
        found = _WRAPPER.fullmatch(name)
        plain = f"{found['path']}.{found['role']}" if found else ""
        if found is None or plain not in others:
            left[name] = key
        elif found["part"] == "original_module":
            originals[plain] = key
    return left, originals
