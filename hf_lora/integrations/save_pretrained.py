"""``save_pretrained`` of a wrapped model, and of a model of which a part is wrapped."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.owner import check_rest_frozen, owner
from hf_lora.adapter_io.save import save_state
from hf_lora.compat.deepspeed import is_partitioned
from hf_lora.compat.dtensor import has_distributed_parameters
from hf_lora.errors import StateError
from hf_lora.hub.upload import push
from hf_lora.model.registry import wrapped

_HUB_OPTIONS = {"repo_id", "private", "revision", "create_pr", "commit_message"}


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    safe_serialization: bool = True,
    save_function: Any = None,
    selected_adapters: Iterable[str] | None = None,
    **hub_options: Any,
) -> None:
    """Save the adapters, and nothing else, into a folder; see :func:`hf_lora.save`.

    Takes what transformers, Trainer and PEFT pass. Of these, sharding and save functions have no
    meaning for an adapter; ``safe_serialization=False`` is refused.
    """
    # no parameter of its own: diffusers' pipelines pass False to whatever has one
    save_peft_format = hub_options.pop("save_peft_format", True)
    if not safe_serialization or not save_peft_format or variant is not None:
        raise StateError(
            "An adapter is saved as adapter_model.safetensors in PEFT's format; "
            "safe_serialization=False, save_peft_format=False and variant=... are not supported."
        )
    unknown = hub_options.keys() - _HUB_OPTIONS
    if unknown or (hub_options and not push_to_hub):
        raise TypeError(f"save_pretrained got unexpected arguments: {', '.join(hub_options)}")
    if state_dict is not None and not state_dict:
        raise StateError(
            "save_pretrained was given an empty state dict, as DeepSpeed ZeRO-3 does when it "
            "does not gather; set stage3_gather_16bit_weights_on_model_save. Nothing was written."
        )
    if not is_main_process and (state_dict is not None or not _all_come(model)):
        return
    found = owner(model)
    if found is None:
        raise StateError(f"This {type(model).__name__} is not wrapped, nor one part of it.")
    check_rest_frozen(*found)
    gathered = None if state_dict is None else _without_wrappers(state_dict, model)
    save_state(
        model,
        Path(save_directory),
        adapter=list(selected_adapters or ()) or None,
        state_dict=gathered,
        writes=is_main_process,
        found=found,
    )
    if push_to_hub and is_main_process:
        repo_id = hub_options.pop("repo_id", None) or Path(save_directory).name
        push(model, repo_id, token=token, **hub_options)


def _all_come(model: nn.Module) -> bool:
    """Say whether every process saves, each giving its part, or the main one alone.

    Under ZeRO-3 ``accelerator.get_state_dict`` hands the main process what it has gathered, and
    the others None; they must not wait for it.
    """
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        return wrapped(model)[1].all_save
    return has_distributed_parameters(model)


def _without_wrappers(
    state_dict: Mapping[str, torch.Tensor], model: nn.Module
) -> Mapping[str, torch.Tensor]:
    """Take off what DDP and torch.compile put before every name.

    Trainer passes such a state dict when it was given the wrapper instead of the model.
    """
    for prefix in ("module.", "_orig_mod."):
        outside = prefix.removesuffix(".") not in model._modules
        if outside and all(name.startswith(prefix) for name in state_dict):
            inner = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
            return _without_wrappers(inner, model)
    return state_dict
