"""Saving adapters: what a wrapped model holds, as a PEFT folder with a complete header."""

import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.base_check import take_fingerprint
from hf_lora.adapter_io.base_on_disk import base_changes, describe_changes
from hf_lora.adapter_io.base_weights import BaseTensors
from hf_lora.adapter_io.collective import is_main_process, write_on_main
from hf_lora.adapter_io.labels import labels_of
from hf_lora.adapter_io.owner import settled
from hf_lora.adapter_io.peft_conversion import taken_for_experts
from hf_lora.adapter_io.tasks import auto_mapping, peft_task
from hf_lora.adapter_io.tensors import (
    as_saved,
    buffer_key,
    check_finite,
    check_shapes,
    key_of,
    moved_buffers,
    tensors_of,
)
from hf_lora.adapter_io.ties import peft_would_tie
from hf_lora.adapter_io.token_rows import names_for_peft
from hf_lora.compat.accelerate import present
from hf_lora.compat.dtensor import gather_full, has_distributed_parameters, reshard
from hf_lora.config import DTYPES
from hf_lora.errors import ConfigError, HfLoRAWarning, SaveError, listing
from hf_lora.files.data import AdapterData
from hf_lora.files.keys import PREFIX, without_wrappers
from hf_lora.files.patterns import SPECIAL, TailIndex, endings, parents
from hf_lora.files.write import write_folders
from hf_lora.kinds.token_rows import KEY
from hf_lora.layers.names import DEFAULT
from hf_lora.layers.reading import out_projections
from hf_lora.layers.token_rows import TokenRows
from hf_lora.layers.trained import own_tensors, tensor_names
from hf_lora.model.adapter import Adapter
from hf_lora.model.places import adapted_twice
from hf_lora.model.registry import Registry, wrapped
from hf_lora.model.unfrozen import adopt_unfrozen
from hf_lora.planning.ties import followers, full_name
from hf_lora.targets import shortest_names


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Save adapters, and nothing else of the model, in PEFT's format.

    The adapter called ``default`` goes into ``directory`` itself, every other into a folder of its
    name inside, as PEFT does. Saving is atomic and reproducible to the byte. Of several whose save
    was cut short between two of them, each load says so.

    If the model's parameters are spread over several processes (FSDP2, DeepSpeed ZeRO-3), all of
    them must call this: each gives its part, the first writes, and all return when that is done.

    Args:
        model: A wrapped model.
        directory: Where to; made if it does not exist.
        adapter: Save this one only; by default all.
        dtype: Type of the saved tensors, such as ``"bfloat16"``; by default their own, exactly.

    Raises:
        StateError: The model is not wrapped, or its layers were replaced since.
        UnknownAdapterError: There is no such adapter.
        ConfigError: ``dtype`` is not a floating-point type of at most 32 bits.
        SaveError: The folder cannot be written; it holds the old adapter or the new one.
    """
    save_state(model, directory, adapter=adapter, dtype=dtype)


def save_state(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter: str | Iterable[str] | None = None,
    dtype: str | torch.dtype | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    base: str | bool | None = True,
    writes: bool | None = None,
    together: bool = True,
    found: tuple[nn.Module, Registry] | None = None,
) -> list[Path]:
    """Save adapters as :func:`save` does, taking the tensors from ``state_dict`` if one is given.

    Args:
        adapter: Save this one or these only; by default all.
        state_dict: A gathered state dict of the whole model; never empty.
        base: What to name as the base model; True: what the model's configuration says.
        writes: Whether this process writes if several save together; by default the first does.
        together: Whether every process takes part where the model is spread and no ``state_dict``
            is given. If not, an adapter that is spread itself is refused.
        found: The registry, seen from a model of which a part is wrapped.

    Returns:
        The folders that were written.
    """
    # of a part as it is seen anew, with what has moved since
    model, registry = wrapped(model) if found is None else settled(found[0]) or found
    registry.settle_buffers()
    registry.check_in_place(model)
    adopt_unfrozen(model, registry)
    names = registry.adapters if adapter is None else registry.select(adapter)
    to = as_dtype(dtype)
    reshard(model)
    together = together and state_dict is None and has_distributed_parameters(model)
    # all are collected before the first is written: what cannot be saved is found out here
    contents = {
        adapter_folder(Path(directory), name): collect(
            model, registry, name, to, state_dict, base, together=together
        )
        for name in names
    }

    def write() -> None:
        write_folders(Path(directory), contents)

    if together:
        write_on_main(write, here=is_main_process() if writes is None else writes)
    else:
        write()
    return list(contents)


def adapter_folder(directory: Path, name: str) -> Path:
    """Return the folder of adapter ``name`` inside ``directory``."""
    return directory if name == DEFAULT else directory / name


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a type by its name.

    Raises:
        ConfigError: Not one in which an adapter can be kept.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def collect(
    model: nn.Module,
    registry: Registry,
    name: str,
    dtype: torch.dtype | None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    base: str | bool | None = True,
    *,
    together: bool = False,
) -> AdapterData:
    """Collect everything that is written for one adapter.

    Args:
        model, registry, name, dtype, state_dict, base: As for :func:`save_state`.
        together: Whether every process takes part, so that what is spread can be gathered.

    Raises:
        StateError: A tensor is not here, or not as a whole.
        SaveError: PEFT's format cannot say what the adapter is, or a number is not finite.
    """
    adapter = registry.adapter(name)
    modules = {without_wrappers(path): module for path, module in model.named_modules()}
    slots = {without_wrappers(path): slot for path, slot in sorted(adapter.slots.items())}
    if len(slots) < len(adapter.slots):
        twice = sorted(path for path in adapter.slots if path != without_wrappers(path))
        raise SaveError(
            "A layer and the wrapper around it both have an adapter, and a file has one name for "
            f"them (first: {twice[0]}). Target the layer alone."
        )
    _check_places(model, adapter)
    rows = _rows(adapter)
    trained = sorted(map(without_wrappers, adapter.trained))
    follow = map(without_wrappers, followers(adapter.ties, adapter.trained))
    ends = {*trained, *follow}  # one of them may be a part of another
    whole = sorted(path for path in ends if not any(above in ends for above in parents(path)))
    trained_names = shortest_names(whole, modules)
    repeated = _repeated(modules, slots, trained, trained_names)
    copies = [t for path, *_, t in registry.tensors(name) if path in registry.exclusive]
    buffers = _buffers(registry, name)
    tensors = repeated | tensors_of(registry, name, state_dict)
    tensors |= {buffer_key(full, slots): tensor for full, tensor in buffers.items()}
    ties = {key_of(*place): key_of(*first) for place, first in adapter.ties.items()}
    for key in ties.keys() & tensors.keys():
        del tensors[key]  # the base's
    if together:
        tensors = gather_full(tensors)
    check_shapes(registry, name, tensors)
    saved = {key: as_saved(key, tensor, dtype) for key, tensor in tensors.items()}
    check_finite(name, saved, dtype)
    saved |= {key: saved[first] for key, first in ties.items()}
    row_names = names_for_peft(model, rows) if rows else ()
    saved |= {key_of(n, KEY): saved[key_of(rows[n].of or n, KEY)] for n in row_names}
    by_weight = taken_for_experts(model, slots)
    stacked = [path for path, slot in slots.items() if slot.parts]
    outs = out_projections(slots, modules)  # PEFT adapts them with their attention
    if (by_weight or stacked) and adapter.config.dropout:
        first, *_ = parameters = [*by_weight, *stacked]
        warnings.warn(
            f"PEFT finds {first} ({len(parameters)} in all) by its parameters only, and has no "
            "dropout there: where PEFT goes on with this training, it does so without.",
            HfLoRAWarning,
            stacklevel=3,
        )
    left = registry.buffers.left
    ids = {full_name((path, "weight")): own.ids for path, own in rows.items()}
    fingerprint = take_fingerprint(BaseTensors(model, together=together), trained, left, ids)
    purpose = _purpose(model, adapter.origin, base, trained_names)
    return AdapterData(
        config=adapter.config,
        slots=slots,
        trained=tuple(trained),
        tensors=saved,
        target_names=_target_names(modules, slots.keys() - {*by_weight, *stacked, *outs}, whole),
        by_weight=by_weight,
        trained_names=trained_names,
        **purpose,
        buffers=tuple(buffers),
        rows=rows,
        row_names=row_names,
        ties={key.removeprefix(PREFIX): to.removeprefix(PREFIX) for key, to in ties.items()},
        pefts_tie=peft_would_tie(model, adapter.ties, adapter.trained, trained_names),
        fan_in_fan_out=any(registry.modules[path].fan_in_fan_out for path in adapter.slots),
        labels=labels_of(model, copies),
        fingerprint=fingerprint,
        base_changed=_base_changed(model, registry, purpose["base"], fingerprint, ids),
    )


def _rows(adapter: Adapter) -> dict[str, TokenRows]:
    """Return an adapter's rows under the names that files have for modules."""
    return {
        without_wrappers(path): TokenRows(rows.ids, rows.of and without_wrappers(rows.of))
        for path, rows in sorted(adapter.rows.items())
    }


def _buffers(registry: Registry, name: str) -> dict[str, torch.Tensor]:
    """Return the buffers that an adapter has moved; warn, once, of those that are not saved."""
    buffers, left = moved_buffers(registry, name)
    left |= registry.buffers.left
    new = {full: why for full, why in left.items() if full not in registry.buffers.told}
    registry.buffers.told |= new.keys()
    if new:
        warnings.warn(
            listing(
                "These buffers moved in the training, and the file of the adapter does not hold "
                "them",
                [f"{full}: {why}" for full, why in new.items()],
                "Where the result needs them, keep them yourself, or save the whole model after "
                "hf_lora.merge_and_unwrap.",
            ),
            HfLoRAWarning,
            stacklevel=4,
        )
    return buffers


def _purpose(
    model: nn.Module,
    origin: Mapping[str, Any],
    base: str | bool | None,
    trained_names: Collection[str],
) -> dict[str, Any]:
    """Return what an adapter is for: base and revision, task, or the class where it has no task.

    What the file said that it was loaded from is kept.
    """
    named = base_name(model) if base is True else base or None
    same = named is not None and named == origin.get("base_model_name_or_path")
    task = origin.get("task_type")
    if task is None and origin.get("auto_mapping") is None:
        task = peft_task(model, trained_names)
    return {
        "base": named,
        "revision": origin.get("revision") if same else None,
        "task": task,
        "auto_mapping": auto_mapping(model, origin) if task is None else None,
    }


def _base_changed(
    model: nn.Module,
    registry: Registry,
    base: str | None,
    fingerprint: Mapping[str, Any],
    rows: Mapping[str, Collection[int]],
) -> dict[str, Any]:
    """Return, and warn of, what makes the base in memory another than the one that is named."""
    if not is_main_process():
        return {}
    merged = registry.merged_before
    changes = base_changes(model, base_name(model), fingerprint, merged, rows)
    if changes:
        warnings.warn(
            listing(
                f"This adapter names {base or 'no base'} as its base, and the base that it was "
                "trained on is another, which only this process has",
                describe_changes(changes),
                "hf_lora.from_pretrained will refuse what does not fit. Save the base in full as "
                "well (before wrapping: model.save_pretrained(folder)), and load it from there.",
            ),
            HfLoRAWarning,
            stacklevel=4,
        )
    return changes


def _check_places(model: nn.Module, adapter: Adapter) -> None:
    """Raise SaveError if PEFT would read the file as something else: modules in several places."""
    twice = adapted_twice(model, [*adapter.slots, *adapter.rows], adapter.trained)
    if twice:
        raise SaveError(
            listing(
                "These modules stand in several places of the model, and PEFT, whose format this "
                "is, would give their adapter to the first place alone",
                twice,
                "Exclude them, or keep the result with hf_lora.merge_and_unwrap(model)."
                "save_pretrained(...). Nothing was written.",
            )
        )


def base_name(model: nn.Module) -> str | None:
    """Return the Hub id or folder that the base model was loaded from, if it says so."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if isinstance(name, os.PathLike):  # diffusers keeps what it was given
        name = os.fspath(name)
    return name if isinstance(name, str) and name else None


def _target_names(
    modules: Collection[str], slots: Collection[str], trained: Collection[str]
) -> list[str] | str:
    """Return names that, as PEFT reads a list, mean exactly the adapted layers.

    Where one path is the tail of another there are none; a pattern of whole paths always works.
    """
    names = shortest_names(slots, modules)
    index = TailIndex(names)
    meant = {path for path in modules if index.means(path)}
    extra = meant - set(slots)
    # PEFT leaves out by itself what is trained in full
    if all(_is_inside(path, trained) for path in extra):
        return names
    return "|".join(SPECIAL.sub(r"\\\g<0>", path).replace(".", r"\.") for path in sorted(slots))


def _repeated(
    modules: Mapping[str, nn.Module],
    slots: Collection[str],
    trained: Collection[str],
    names: Collection[str],
) -> dict[str, torch.Tensor]:
    """Return the base's tensors of modules that PEFT takes for trained ones, under PEFT's keys.

    PEFT compares ends of text: ``classifier`` means ``pre_classifier`` as well, and a file without
    that cannot be loaded there.

    Raises:
        SaveError: Such a module is adapted, which PEFT's format cannot express.
    """
    found = {}
    wanted = set(names)
    for path in modules:
        if _is_inside(path, trained) or not endings(path, wanted):
            continue
        adapted = [layer for layer in slots if _is_inside(layer, [path])]
        if adapted:
            raise SaveError(
                f"PEFT would take {path} for a module trained in full, because it ends like one of "
                f"{', '.join(names)}; so {adapted[0]} cannot have factors. Exclude it."
            )
        for below, module in modules[path].named_modules():
            with present(module):
                for role, tensor in own_tensors(module, tensor_names(module)):
                    key = ".".join(filter(None, (path, without_wrappers(below), role)))
                    found[f"{PREFIX}{key}"] = tensor
    return found


def _is_inside(path: str, tops: Collection[str]) -> bool:
    return path in tops or any(above in tops for above in parents(path))
