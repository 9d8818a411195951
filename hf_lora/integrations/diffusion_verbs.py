"""The verbs that diffusers' models have for adapters, on a wrapped one.

diffusers' own look for PEFT's layers: on a wrapped model they would find none, and most of them
would then do nothing, in silence.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_lora.compat.diffusers import as_peft, fetched
from hf_lora.errors import AdapterFileError, ConfigError, StateError
from hf_lora.integrations.diffusion_files import FACTORS, FILE, attach, write
from hf_lora.integrations.own_methods import take_off
from hf_lora.merging.in_memory import merge, unmerge
from hf_lora.model.adapters import delete_adapter
from hf_lora.model.choices import activate
from hf_lora.model.registry import registry_of


def save_lora_adapter(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    adapter_name: str | None = "default",
    upcast_before_saving: bool = False,
    safe_serialization: bool = True,
    weight_name: str | None = None,
) -> None:
    """Save one adapter as diffusers does, for ``load_lora_adapter(folder, prefix=None)``.

    Raises:
        SaveError: It has more than low-rank factors.
        StateError: A pickle is asked for, or 32 bits of what has fewer.
    """
    name = adapter_name or next(iter(registry_of(model).adapters))
    check_safe(safe_serialization)
    if upcast_before_saving:
        raise StateError(
            "upcast_before_saving=True would turn all of the model to 32 bits. Say hf_lora.save("
            "model, folder, dtype='float32') for a file of that type."
        )
    write(model, Path(save_directory) / (weight_name or FILE), name)


def check_safe(safe_serialization: bool) -> None:
    """Raise if a pickle is asked for."""
    if not safe_serialization:
        raise StateError("safe_serialization=False means a pickle, which hf_lora never writes.")


def load_lora_adapter(
    model: nn.Module,
    pretrained_model_name_or_path_or_dict: Any,
    prefix: str | None = "transformer",
    hotswap: bool = False,
    *,
    adapter_name: str | None = None,
    network_alphas: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    low_cpu_mem_usage: bool = False,
    _pipeline: Any = None,
    **where: Any,
) -> None:
    """Attach one more adapter from what diffusers' pipelines read, and use it.

    Args:
        pretrained_model_name_or_path_or_dict: Tensors under their names, a folder, a file or a
            repository.
        prefix: What the names of this model's tensors begin with; None for nothing.
        hotswap: Put it in the place of the adapter of that name.
        adapter_name: Its name; by default one that is free.
        network_alphas: A layer's name to its alpha, where the file has these.
        metadata: PEFT's configuration, as the header has it.
        low_cpu_mem_usage: Makes no difference: nothing is made twice in any case.
        **where: What diffusers takes to find a file: ``weight_name``, ``subfolder``, ...

    Raises:
        AdapterFileError: There is nothing for this model in it, or no LoRA.
        AdapterMismatchError: It does not fit.
    """
    given = pretrained_model_name_or_path_or_dict
    if not isinstance(given, Mapping):
        given, metadata = fetched(given, where)
    elif where:
        raise ConfigError(f"{', '.join(sorted(where))} say nothing about tensors that are given.")
    alphas = {f"{_bare(key)}.alpha": value for key, value in (network_alphas or {}).items()}
    tensors = _below({**given, **alphas}, prefix)
    if not any(not key.endswith(".alpha") for key in tensors):
        others = [n for n in getattr(_pipeline, "_lora_loadable_modules", ()) if n != prefix]
        if any(_below(given, other) for other in others):
            return  # it is for other components
        first = next(iter(given), "nothing")
        raise AdapterFileError(
            f"Nothing in it is for this {type(model).__name__}: no name begins with {prefix!r} "
            f"(first: {first}). What hf_lora or PEFT saved, hf_lora.load(model, folder) reads; "
            "prefix= says what other names begin with."
        )
    if not any(key.endswith(FACTORS) for key in tensors):
        tensors = as_peft(tensors)
    fields = _below(metadata, prefix) if metadata else None
    registry = registry_of(model)
    attach(
        model, tensors, fields or None, adapter_name or _free(registry.adapters), replace=hotswap
    )


def _below(tensors: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    if prefix is None:
        return dict(tensors)
    start = f"{prefix}."
    return {k.removeprefix(start): value for k, value in tensors.items() if k.startswith(start)}


def _bare(key: str) -> str:
    """Return the path of the layer that an alpha is of."""
    for end in (".alpha", *FACTORS):
        key = key.removesuffix(end)
    return key


def _free(taken: Mapping[str, Any]) -> str:
    number = 0
    while f"default_{number}" in taken:
        number += 1
    return f"default_{number}"


def set_adapters(model: nn.Module, adapter_names: str | list[str], weights: Any = None) -> None:
    """Use these adapters, each at its weight; see :func:`hf_lora.activate`."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    each = weights if isinstance(weights, list) else [weights] * len(names)
    if len(each) != len(names):
        raise ConfigError(f"There are {len(names)} adapters and {len(each)} weights.")
    if any(isinstance(weight, dict) for weight in each):
        raise ConfigError("hf_lora has no weight for each block of a model; give one number.")
    pairs = zip(names, each, strict=True)
    activate(model, {name: 1.0 if weight is None else weight for name, weight in pairs})


def delete_adapters(model: nn.Module, adapter_names: str | list[str]) -> None:
    """Take adapters off, the last one as well."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    if {*names} == {*registry_of(model).adapters}:
        take_off(model)
    else:
        delete_adapter(model, names)


def unload_lora(model: nn.Module) -> None:
    """Take every adapter off; see :func:`hf_lora.unwrap`."""
    take_off(model)


def fuse_lora(
    model: nn.Module,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """Put adapters into the weights; see :func:`hf_lora.merge`, which is safe in any case."""
    used = dict(registry_of(model).routing.now().live)
    names = used if adapter_names is None else dict.fromkeys(adapter_names, 1.0)
    merge(model, {name: used.get(name, 1.0) * lora_scale for name in names})


def unfuse_lora(model: nn.Module) -> None:
    """Take them out again, to the last bit; see :func:`hf_lora.unmerge`."""
    unmerge(model)


def enable_lora_hotswap(model: nn.Module, **_: Any) -> None:
    """Refuse what prepares PEFT's layers; ours need no preparation."""
    raise StateError(
        "Nothing has to be prepared: load_lora_adapter(..., hotswap=True) puts an adapter in the "
        "place of another, where it has the same layers and ranks without any new tensor."
    )


VERBS = {
    "save_lora_adapter": save_lora_adapter,
    "load_lora_adapter": load_lora_adapter,
    "set_adapters": set_adapters,
    "delete_adapters": delete_adapters,
    "unload_lora": unload_lora,
    "fuse_lora": fuse_lora,
    "unfuse_lora": unfuse_lora,
    "enable_lora_hotswap": enable_lora_hotswap,
}
"""Name of each to what stands in its place on a wrapped model whose class has it."""
