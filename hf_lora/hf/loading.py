"""Loading adapters: every tensor of the file proven to fit, before the model is touched."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    HfLoRAWarning,
    listing,
)
from hf_lora.files.fingerprint import differences
from hf_lora.files.peft_format import expected_layers
from hf_lora.files.read import AdapterFolder, read_folder
from hf_lora.hf.base_weights import base_reader
from hf_lora.hf.resolve import Rename, resolve
from hf_lora.layers.base import LoRALayer, Slot, added_names
from hf_lora.layers.hosts import adapter_dtype, features, rank_fault, why_not
from hf_lora.layers.names import LORA_A, LORA_B
from hf_lora.layers.quantized import keep_gradients
from hf_lora.layers.trained import TrainedModule, own_tensors, tensor_names
from hf_lora.model.adapters import check_new_name, freeze
from hf_lora.model.patch import attach, check_present, detach, unpatch
from hf_lora.model.planning import output_head
from hf_lora.model.registry import Registry, create, find
from hf_lora.targets import shortest_names


@dataclasses.dataclass(frozen=True)
class Match:
    """A checked adapter folder and where each of its tensors goes in a model."""

    folder: AdapterFolder
    slots: dict[str, Slot]
    trained: list[str]
    keys: dict[tuple[str, str], str]
    """(path in the model, role) to the key in the file."""

    told: list[str]
    """What was resolved or left out on the way."""


def load_folder(
    model: nn.Module,
    directory: Path,
    *,
    adapter: str,
    trainable: bool,
    check_base: bool,
) -> nn.Module:
    """Attach the adapter in ``directory`` to ``model``; see :func:`hf_lora.load`."""
    found = find(model)
    model, registry = found or (model, None)
    if registry is not None:
        check_new_name(registry, adapter)
        registry.check_unmerged("load an adapter")
    match = match_folder(read_folder(directory), model, check_base=check_base)
    values = read_values(match)
    dtypes = _dtypes(match, model)
    if registry is None:
        registry = create(model)
        registry.repacked = keep_gradients(model)
    try:
        attach(model, registry, adapter, _config(match, model), match.slots, match.trained, dtypes)
        fill(registry, adapter, values)
    except BaseException:
        if found is None:
            unpatch(model)
        elif adapter in registry.adapters:
            detach(registry, adapter)
        raise
    if found is None:
        registry.routing.active = (adapter,)
    if not trainable:
        freeze(model, adapter)
    for line in match.told:
        warnings.warn(f"{directory}: {line}", HfLoRAWarning, stacklevel=3)
    return model


def restore(model: nn.Module, registry: Registry, folders: Mapping[str, Path]) -> None:
    """Overwrite the values of adapters that the model has with those in their folders.

    All folders are checked before the first value changes.

    Raises:
        AdapterFileError: Unsound, or not the same layers, ranks and strengths.
    """
    values = {name: _values_for(model, registry, name, folder) for name, folder in folders.items()}
    for name, found in values.items():
        fill(registry, name, found)


def _values_for(
    model: nn.Module, registry: Registry, name: str, directory: Path
) -> dict[tuple[str, str], torch.Tensor]:
    match = match_folder(read_folder(directory), model, check_base=True)
    adapter = registry.adapter(name)
    problems = []
    for path in sorted(adapter.slots.keys() | match.slots.keys()):
        here, there = adapter.slots.get(path), match.slots.get(path)
        if _mathematics(here) != _mathematics(there):
            problems.append(f"{path}: the model has {here}, the file {there}")
    if set(adapter.trained) != set(match.trained):
        problems.append(f"trained in full: {adapter.trained}, in the file {match.trained}")
    if problems:
        raise AdapterMismatchError(
            listing(f"{directory} holds another adapter than the model's {name!r}", problems)
        )
    return read_values(match)


def match_folder(folder: AdapterFolder, model: nn.Module, *, check_base: bool) -> Match:
    """Check that every tensor in the folder has its place in ``model`` and every place its tensor.

    Raises:
        AdapterMismatchError: Something does not fit; one line each.
        BaseMismatchError: Everything fits, but the base's weights are others.
    """
    modules = dict(model.named_modules())
    owned = {
        f"{path}.{name}" if path else name: (path, name)
        for path, module in modules.items()
        for name in _tensor_names(module)
    }
    rename, words = resolve([*folder.factors, *folder.others], modules.keys() | owned.keys(), model)
    told = [words] if words else []
    told += [f"{part!r} in the names was taken off" for part in folder.renamed]
    told += [f"the field {name!r} is unknown and was ignored" for name in folder.unknown_fields]
    problems: list[str] = []
    slots: dict[str, Slot] = {}
    keys: dict[tuple[str, str], str] = {}
    for name, factors in folder.factors.items():
        path = rename(name)
        fault = _factor_fault(modules.get(path), path, factors.in_features, factors.out_features)
        fault = fault or (rank_fault(modules[path], factors.r) if path in modules else None)
        if fault or path in slots:
            problems.append(f"{path}: {fault or 'named twice'}")
            continue
        slots[path] = folder.slots[name]
        keys[path, LORA_A], keys[path, LORA_B] = factors.a_key, factors.b_key
    trained = _match_trained(folder, rename, modules, owned, keys, problems, told)
    if not problems:
        problems += _missing_layers(folder, model, modules, slots, trained)
    if problems:
        raise AdapterMismatchError(
            listing(f"{folder.directory} does not fit this {type(model).__name__}", problems)
        )
    check_present(model, [*slots, *trained])
    if check_base and folder.header is not None:
        _check_base(folder, rename, model)
    return Match(folder, slots, trained, keys, told)


def read_values(match: Match) -> dict[tuple[str, str], torch.Tensor]:
    """Read every tensor and check that its numbers are finite.

    Raises:
        AdapterFileError: One line for each tensor that is not.
    """
    where = {key: place for place, key in match.keys.items()}
    values = {where[key]: tensor for key, tensor in match.folder.file.read(list(where))}
    bad = [
        match.keys[place]
        for place, tensor in values.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if bad:
        raise AdapterFileError(
            listing(f"{match.folder.file.path} holds numbers that are not finite", bad)
        )
    return values


@torch.no_grad()
def fill(registry: Registry, name: str, values: dict[tuple[str, str], torch.Tensor]) -> None:
    """Copy the values into the adapter's tensors: each into one, none left over."""
    left = dict(values)
    for path, _, role, tensor in registry.tensors(name):
        tensor.copy_(left.pop((path, role)))
    assert not left, f"no place for {sorted(left)}"


def _match_trained(
    folder: AdapterFolder,
    rename: Rename,
    modules: dict[str, nn.Module],
    owned: dict[str, tuple[str, str]],
    keys: dict[tuple[str, str], str],
    problems: list[str],
    told: list[str],
) -> list[str]:
    """Find the modules that were trained in full, and check that they are there as a whole."""
    found: dict[str, tuple[str, str, str]] = {}
    for name, key in folder.others.items():
        full = rename(name)
        place = owned.get(full)
        if place is None:
            problems.append(f"{key}: the model has no {full}")
        else:
            found[full] = (*place, key)
    tops: list[str] = []
    for name in folder.trained_names:
        meant = {
            rename(top) for full in folder.others for top in _parents(full) if _is_tail(name, top)
        }
        if not meant:
            problems.append(f"modules_to_save names {name!r}, but no tensor belongs to it")
        tops.extend(sorted(meant - set(tops)))
    for full, (path, role, key) in found.items():
        if not any(_below(full, top) for top in tops):
            problems.append(f"{key}: neither a factor nor part of a module in modules_to_save")
            continue
        shape = tuple(dict(own_tensors(modules[path], (role,)))[role].shape)
        if folder.file.shapes[key] != shape:
            problems.append(f"{key}: shape {folder.file.shapes[key]}, in the model {shape}")
        keys[path, role] = key
    for top in tops:
        lacking = [full for full in owned if _below(full, top) and full not in found]
        problems.extend(f"{full} is missing from the file" for full in lacking)
    return tops


def _parents(full: str) -> list[str]:
    parts = full.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _is_tail(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _below(full: str, top: str) -> bool:
    return full.startswith(f"{top}.")


def _tensor_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the module's own tensors, without anything that hf_lora added."""
    if isinstance(module, TrainedModule):
        return module.lora_names
    added = added_names(module) if isinstance(module, LoRALayer) else set()
    return tuple(name for name in tensor_names(module) if name not in added)


def _factor_fault(
    module: nn.Module | None, path: str, in_features: int, out_features: int
) -> str | None:
    if module is None:
        return "the model has no such module"
    fault = why_not(module)
    if fault:
        return fault
    sizes = features(module)
    if sizes != (in_features, out_features):
        return f"the adapter is for in, out = {(in_features, out_features)}, the layer has {sizes}"
    return None


def _missing_layers(
    folder: AdapterFolder,
    model: nn.Module,
    modules: dict[str, nn.Module],
    slots: dict[str, Slot],
    trained: list[str],
) -> list[str]:
    """Compare the layers in the file with those that its configuration promises."""
    linear = [path for path, module in modules.items() if why_not(module) is None]
    source = str(folder.directory / "adapter_config.json")
    promised = expected_layers(folder.fields, linear, output_head(model), source)
    if promised is None:
        return ["target_modules is missing from the configuration"]
    promised = {path for path in promised if not any(path == t or _below(path, t) for t in trained)}
    problems = [f"{path} is a target, but has no tensors" for path in sorted(promised - set(slots))]
    problems += [f"{path} has tensors, but is no target" for path in sorted(set(slots) - promised)]
    return problems


def _check_base(folder: AdapterFolder, rename: Rename, model: nn.Module) -> None:
    assert folder.header is not None
    fingerprint = folder.header.get("fingerprint")
    if not isinstance(fingerprint, dict):
        return
    names = {name: rename(name) for name in folder.factors}
    found = differences(fingerprint, names, base_reader(model))
    if found:
        base = folder.base or "another model"
        raise BaseMismatchError(
            listing(
                f"{folder.directory} was trained on {base}, and this model's weights are others",
                found,
                "Load the right base, or pass check_base=False if you know that this is wanted.",
            )
        )


def _dtypes(match: Match, model: nn.Module) -> dict[str, torch.dtype]:
    """Return the type of each layer's factors: the configuration's, or what the base asks for."""
    config = match.folder.config
    if config is not None and config.dtype is not None:
        chosen: torch.dtype = getattr(torch, config.dtype)
        return dict.fromkeys(match.slots, chosen)
    return {path: adapter_dtype(model.get_submodule(path)) for path in match.slots}


def _config(match: Match, model: nn.Module) -> LoRAConfig:
    """Return the adapter's own configuration, or the one that its file amounts to."""
    if match.folder.config is not None:
        return match.folder.config
    paths = [path for path, _ in model.named_modules()]
    first = next(iter(match.slots.values()))
    by_path = {
        path: {"r": slot.r, "alpha": slot.alpha}
        for path, slot in match.slots.items()
        if (slot.r, slot.alpha) != (first.r, first.alpha)
    }
    return LoRAConfig(
        targets=[_escape(name) for name in shortest_names(match.slots.keys(), paths)],
        r=first.r,
        alpha=first.alpha,
        dropout=first.dropout,
        rslora=first.rslora,
        overrides={_escape(path): fields for path, fields in by_path.items()},
        train=[_escape(path) for path in match.trained],
    )


def _escape(name: str) -> str:
    return name.replace(".", r"\.")


def _mathematics(slot: Slot | None) -> tuple | None:
    return slot and (slot.r, slot.alpha, slot.rslora)
