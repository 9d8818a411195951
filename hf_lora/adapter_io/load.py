"""Loading adapters: every tensor of the file proven to fit, before the model is touched."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from hf_lora.adapter_io.config_of import config_of
from hf_lora.adapter_io.match import Match, match_folder
from hf_lora.adapter_io.owner import holder_of
from hf_lora.compat.bitsandbytes import keep_gradients
from hf_lora.compat.deepspeed import have_engine, shape_of
from hf_lora.compat.dtensor import distribute_like, gather_full, reshard
from hf_lora.config import LoRAConfig
from hf_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    HfLoRAWarning,
    StateError,
    TargetError,
    listing,
)
from hf_lora.files.read import read_folder
from hf_lora.files.set_note import mixture
from hf_lora.kinds.table import kind_of
from hf_lora.layers.holding import held_by
from hf_lora.layers.hosts import adapter_dtype, chosen_dtype
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.roles import Place
from hf_lora.layers.token_rows import ROWS
from hf_lora.layers.trained import copy_dtype, own_tensors
from hf_lora.model.adapters import check_new_name, set_trainable
from hf_lora.model.checks import check_no_engine
from hf_lora.model.patch import attach
from hf_lora.model.registry import Registry, check_fresh, create, find
from hf_lora.model.replacing import check_replaceable, replaced
from hf_lora.model.transaction import Transaction
from hf_lora.planning.ties import full_name


def load_folder(
    model: nn.Module,
    directory: Path,
    change: Transaction,
    *,
    adapter: str,
    trainable: bool,
    check_base: bool,
    missing: str = "error",
    replace: bool = False,
) -> nn.Module:
    """Attach the adapter in ``directory``, as a part of a change; see :func:`hf_lora.load`."""
    found = find(model)
    model, registry = found or (model, None)
    reshard(model)
    if registry is None:
        check_fresh(model)
    else:
        registry.settle_buffers()
    anew = replace and registry is not None and adapter in registry.adapters
    if registry is not None and anew:
        check_replaceable(registry, adapter)
        _check_no_copies(registry, (adapter,))
    elif registry is not None:
        check_new_name(registry, adapter)
    match = match_folder(read_folder(directory), model, check_base=check_base, missing=missing)
    dtypes = _dtypes(match, model)
    values = read_values(match, _place_dtypes(match, model, dtypes))
    buffers = {place: values.pop(place) for place in match.buffers}
    if trainable:
        check_no_engine(model)
        _check_gradients(model, list(match.slots))
    if match.told:  # before anything changes: a filter may turn it into an error
        one = len(match.told) == 1
        words = f"{directory}: {match.told[0]}" if one else listing(str(directory), match.told)
        warnings.warn(words, HfLoRAWarning, stacklevel=3)
    registry = registry or create(model)
    if found is None:
        registry.repacked = keep_gradients(model)
    config = config_of(match, model)
    if anew and _has_room(registry, adapter, match, values):
        _keep(change, model, registry, adapter, buffers)
        _refill(registry, adapter, config, match, values)
    else:
        with replaced(model, registry, adapter) if anew else contextlib.nullcontext():
            attach(
                model,
                registry,
                adapter,
                config,
                match.slots,
                match.trained,
                dtypes=dtypes,
                ties=match.ties,
                biases=match.biases,
                rows=match.rows,
            )
            registry.adapter(adapter).origin = match.folder.origin
            fill(registry, adapter, values)
    fill_buffers(model, registry, adapter, buffers)
    if found is None:
        registry.routing.choose(((adapter, 1.0),))
    registry.buffers.note_again(model, registry)
    set_trainable(model, registry, adapter, trainable)
    return model


def _has_room(
    registry: Registry, name: str, match: Match, values: Mapping[Place, torch.Tensor]
) -> bool:
    """Say whether a file's values fit into the tensors that an adapter has."""
    tensors = {(path, role): tensor for path, _, role, tensor in registry.tensors(name)}
    return (
        set(registry.adapter(name).trained) == set(match.trained)
        and registry.adapter(name).ties == match.ties
        and set(registry.adapter(name).biases) == set(match.biases)
        and dict(registry.adapter(name).rows) == match.rows
        and tensors.keys() == values.keys()
        and all(
            shape_of(tensor) == values[place].shape and tensor.dtype == values[place].dtype
            for place, tensor in tensors.items()
        )
    )


def _refill(
    registry: Registry,
    name: str,
    config: LoRAConfig,
    match: Match,
    values: dict[Place, torch.Tensor],
) -> None:
    """Put a file's values and numbers in the place of an adapter's."""
    adapter = registry.adapter(name)
    fill(registry, name, values)
    for path, slot in match.slots.items():
        adapter.slots[path] = registry.modules[path].lora_slots[name] = slot
    adapter.config, adapter.origin, adapter.training = config, match.folder.origin, None


def restore(model: nn.Module, registry: Registry, folders: Mapping[str, Path]) -> None:
    """Overwrite the values of adapters that the model has with those in their folders.

    A buffer of the base that is in none has not moved: an adapter's own gets the base's values.

    All folders are checked before the first value changes; an interrupt leaves all values as they
    were, or puts all in.

    Raises:
        AdapterFileError: Unsound, of different saves, or not the same layers, ranks and strengths.
        StateError: The model is merged, or DeepSpeed's optimizer has copies of the adapters.
    """
    registry.check_unmerged("restore an adapter", folders)
    _check_no_copies(registry, folders)
    mixed = [line for folder in folders.values() if (line := mixture(folder))]
    if mixed:
        raise AdapterFileError(listing("This is the state of no training", dict.fromkeys(mixed)))
    reshard(model)
    values = {name: _values_for(model, registry, name, folder) for name, folder in folders.items()}
    with Transaction(holder_of(model), "values") as change:
        for name, (_, buffers) in values.items():
            _keep(change, model, registry, name, buffers)
        for name, (found, buffers) in values.items():
            fill(registry, name, found)
            fill_buffers(model, registry, name, buffers)
        change.commit()


def _keep(
    change: Transaction,
    model: nn.Module,
    registry: Registry,
    name: str,
    buffers: Iterable[Place],
) -> None:
    """Note what is about to be overwritten, and the modules that are given buffers."""
    held = [tensor for *_, tensor in registry.held_buffers(name)]
    change.keep_values([*(tensor for *_, tensor in registry.tensors(name)), *held])
    change.keep_modules(model.get_submodule(path) for path, _ in buffers)


def _check_no_copies(registry: Registry, names: Iterable[str]) -> None:
    if have_engine(tensor for name in names for *_, tensor in registry.tensors(name)):
        raise StateError(
            "DeepSpeed's optimizer steps copies of these adapters, so values that were put into "
            "the model would be gone at its next step. Load before deepspeed.initialize or "
            "accelerator.prepare, or let DeepSpeed load a checkpoint of its own."
        )


def _values_for(
    model: nn.Module, registry: Registry, name: str, directory: Path
) -> tuple[dict[Place, torch.Tensor], dict[Place, torch.Tensor]]:
    """Return what a folder has for an adapter's tensors, and for buffers of the base."""
    match = match_folder(read_folder(directory), model, check_base=True)
    adapter = registry.adapter(name)
    problems = []
    for path in sorted(adapter.slots.keys() | match.slots.keys()):
        here, there = adapter.slots.get(path), match.slots.get(path)
        if _mathematics(here) != _mathematics(there):
            problems.append(f"{path}: the model has {here}, the file {there}")
    if set(adapter.trained) != set(match.trained):
        problems.append(f"trained in full: {adapter.trained}, in the file {match.trained}")
    if set(adapter.biases) != set(match.biases):
        problems.append(f"biases: {adapter.biases}, in the file {match.biases}")
    if dict(adapter.rows) != match.rows:
        counts = ({p: len(r.ids) for p, r in of.rows.items()} for of in (adapter, match))
        problems.append("rows: the model has {}, the file {}, or others".format(*counts))
    if dict(adapter.ties) != match.ties:
        here, there = (sorted(map(full_name, ties)) for ties in (adapter.ties, match.ties))
        problems.append(f"tied to other tensors: {here}, in the file {there}")
    if problems:
        raise AdapterMismatchError(
            listing(f"{directory} holds another adapter than the model's {name!r}", problems)
        )
    dtypes = {(path, role): tensor.dtype for path, _, role, tensor in registry.tensors(name)}
    dtypes |= {place: _buffer_of(model, place).dtype for place in match.buffers}
    values = read_values(match, dtypes)
    return values, {place: values.pop(place) for place in match.buffers}


def read_values(match: Match, dtypes: Mapping[Place, torch.dtype]) -> dict[Place, torch.Tensor]:
    """Read every tensor, in the type that it has in the model, and check that it is finite there.

    Raises:
        AdapterFileError: One line for each tensor that is not.
    """
    where = {key: place for place, key in match.keys.items()}
    values = {
        where[key]: tensor.to(dtypes[where[key]])
        for key, tensor in match.folder.file.read(list(where))
    }
    bad = [
        match.keys[place]
        for place, tensor in values.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if bad:
        raise AdapterFileError(
            listing(
                f"{match.folder.file.path} holds numbers that are not finite, or would not be in "
                "the type that they get here",
                bad,
            )
        )
    return values


def check_values(model: nn.Module, registry: Registry, folders: Mapping[str, Path]) -> None:
    """Raise unless adapters have the very values that are in their folders.

    Raises:
        AdapterFileError: A file is unsound.
        AdapterMismatchError: The adapters are others, or have other values; each is named.
    """
    problems = []
    for name, folder in folders.items():
        values, buffers = _values_for(model, registry, name, folder)
        tensors = {(path, role): tensor for path, _, role, tensor in registry.tensors(name)}
        whole = gather_full(tensors)
        for path, _, role, copy in registry.held_buffers(name):
            whole[path, role] = copy
            values[path, role] = _buffer_of(model, (path, role)).to("cpu", copy.dtype)
        whole |= {place: _buffer_of(model, place) for place in buffers.keys() - whole.keys()}
        values |= buffers
        problems += [
            f"{path}.{role} of {name!r}"
            for (path, role), there in values.items()
            if not torch.equal(whole[path, role].cpu(), there)
        ]
    if problems:
        raise AdapterMismatchError(
            listing(
                "These adapter tensors are not what the checkpoint's adapter file says",
                problems,
                "What else is in the checkpoint comes from another save, or was not loaded.",
            )
        )


@torch.no_grad()
def fill(registry: Registry, name: str, values: dict[Place, torch.Tensor]) -> None:
    """Copy the values into the adapter's tensors: each into one, none left over."""
    left = dict(values)
    for path, _, role, tensor in registry.tensors(name):
        tensor.copy_(distribute_like(left.pop((path, role)), tensor))
    assert not left, f"no place for {sorted(left)}"


@torch.no_grad()
def fill_buffers(
    model: nn.Module, registry: Registry, name: str, values: Mapping[Place, torch.Tensor]
) -> None:
    """Give an adapter these buffers; any others that it has get the base's values."""
    lead, real = ("", registry) if registry.part is None else registry.part
    held = {(path, role): module for path, module, role, _ in registry.held_buffers(name)}
    modules = held | {place: model.get_submodule(place[0]) for place in values}
    for place, module in modules.items():
        path, role = place
        copy = _buffer_of(model, place).detach().clone()
        copy.copy_(values.get(place, copy))
        if place in held and held_by(module, name)[role].shape == copy.shape:
            held_by(module, name)[role].copy_(copy)
        else:
            own = path.removeprefix(lead).removeprefix(".")
            real.buffers.give(real, name, own, module, role, copy)


def _buffer_of(model: nn.Module, place: Place) -> torch.Tensor:
    """Return what the base has at a place."""
    path, role = place
    return dict(own_tensors(model.get_submodule(path), (role,)))[role]


def _check_gradients(model: nn.Module, paths: list[str]) -> None:
    """Raise TargetError if no gradient passes through a layer; one of each kind is tried."""
    faults: dict[str, str | None] = {}
    tried: set[tuple] = set()
    for path in paths:
        module = model.get_submodule(path)
        kind = kind_of(module)
        key = kind and kind.lora_probe_key(module)
        if kind is not None and key is not None and (kind, *key) not in tried:
            tried.add((kind, *key))
            faults[path] = kind.lora_gradient_fault(module)
    problems = [f"{path}: {fault}" for path, fault in faults.items() if fault]
    if problems:
        raise TargetError(
            listing("These layers cannot be trained through", problems, "Load with trainable=False")
        )


def _dtypes(match: Match, model: nn.Module) -> dict[str, torch.dtype]:
    """Return the type of each layer's factors: the configuration's, or what the base asks for."""
    chosen = chosen_dtype(match.folder.config)
    if chosen is not None:
        return dict.fromkeys(match.slots, chosen)
    return {path: adapter_dtype(model.get_submodule(path)) for path in match.slots}


def _place_dtypes(
    match: Match, model: nn.Module, dtypes: dict[str, torch.dtype]
) -> dict[Place, torch.dtype]:
    """Return the type that each tensor of the file gets in the model."""
    found = {}
    wanted = chosen_dtype(match.folder.config)
    for path, role in match.keys:
        if path in dtypes:
            found[path, role] = dtypes[path]
        else:
            name = "weight" if role == ROWS else role
            tensors = dict(own_tensors(model.get_submodule(path), (name,)))
            found[path, role] = copy_dtype(tensors[name], wanted)
    return found


def _mathematics(slot: LayerConfig | None) -> LayerConfig | None:
    return slot and dataclasses.replace(slot, dropout=0.0)
