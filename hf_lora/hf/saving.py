"""Saving adapters: what a wrapped model holds, as a PEFT folder with a complete header."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from hf_lora.config import DTYPES
from hf_lora.errors import ConfigError, StateError
from hf_lora.files.content import Content
from hf_lora.files.fingerprint import take
from hf_lora.files.peft_format import PREFIX
from hf_lora.files.write import write_folder
from hf_lora.hf.base_weights import base_reader
from hf_lora.layers.hosts import features
from hf_lora.layers.names import DEFAULT
from hf_lora.model.registry import Registry, wrapped
from hf_lora.targets import shortest_names

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Save adapters, and nothing else of the model, in PEFT's format.

    The adapter called ``default`` goes into ``directory`` itself, every other into a folder of its
    name inside, as PEFT does. Saving is atomic and reproducible to the byte.

    Args:
        model: A wrapped model.
        directory: Where to; made if it does not exist.
        adapter: Save this one only; by default all.
        dtype: Type of the saved tensors, such as ``"bfloat16"``; by default their own, exactly.

    Raises:
        StateError: The model is not wrapped, or its layers were replaced since.
        UnknownAdapterError: There is no such adapter.
        ConfigError: ``dtype`` is not a floating-point type of at most 32 bits.
        SaveError: The folder cannot be written; what was there before still is.
    """
    save_state(model, directory, adapter=adapter, dtype=dtype)


def save_state(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter: str | None = None,
    dtype: str | torch.dtype | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    base: str | bool | None = True,
) -> list[Path]:
    """Save adapters as :func:`save` does, taking the tensors from ``state_dict`` if one is given.

    Args:
        state_dict: A gathered state dict of the whole model; never empty.
        base: What to name as the base model; True: what the model's configuration says.

    Returns:
        The folders that were written.
    """
    model, registry = wrapped(model)
    registry.check_in_place(model)
    names = list(registry.adapters) if adapter is None else [registry.adapter(adapter).name]
    to = as_dtype(dtype)
    folders = []
    for name in names:
        content = collect(model, registry, name, to, state_dict, base)
        folders.append(adapter_folder(Path(directory), name))
        write_folder(folders[-1], content)
    return folders


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
) -> Content:
    """Collect everything that is written for one adapter."""
    adapter = registry.adapter(name)
    paths = [path for path, _ in model.named_modules()]
    trained = sorted(adapter.trained)
    return Content(
        config=adapter.config,
        slots=dict(sorted(adapter.slots.items())),
        trained=tuple(trained),
        tensors=_tensors(registry, name, dtype, state_dict),
        target_names=shortest_names(adapter.slots.keys(), paths),
        trained_names=_trained_names(trained, paths),
        base=base_name(model) if base is True else base or None,
        revision=None,
        task=_task(model),
        fan_in_fan_out=any(registry.layers[path].fan_in_fan_out for path in adapter.slots),
        fingerprint=take(
            {path: features(registry.layers[path]) or (0, 0) for path in adapter.slots},
            base_reader(model),
        ),
    )


def base_name(model: nn.Module) -> str | None:
    """Return the Hub id or folder that the base model was loaded from, if it says so."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _tensors(
    registry: Registry,
    name: str,
    dtype: torch.dtype | None,
    state_dict: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    gathered = _by_role(registry, name, state_dict) if state_dict is not None else None
    tensors = {}
    for path, _, role, tensor in registry.tensors(name):
        factor = role in ("lora_A", "lora_B")
        dotted = f"{path}." if path else ""
        key = f"{PREFIX}{dotted}{role}.weight" if factor else f"{PREFIX}{dotted}{role}"
        value = tensor.detach() if gathered is None else gathered[path, role].detach()
        if value.shape != tensor.shape:
            raise StateError(
                f"{dotted}{role} has shape {tuple(value.shape)} where {tuple(tensor.shape)} is "
                "expected: it is one rank's share. Gather the adapter before saving."
            )
        tensors[key] = value.to(dtype) if dtype and value.is_floating_point() else value
    return tensors


def _by_role(
    registry: Registry, name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[tuple[str, str], torch.Tensor]:
    found = {}
    missing = []
    for path, role, key in registry.keys(name):
        if key in state_dict:
            found[path, role] = state_dict[key]
        else:
            missing.append(key)
    if missing:
        raise StateError(
            f"The state dict to save from lacks {len(missing)} adapter tensors (first: "
            f"{missing[0]}; it has {len(state_dict)} tensors). With DeepSpeed ZeRO-3, set "
            "stage3_gather_16bit_weights_on_model_save."
        )
    return found


def _trained_names(trained: list[str], paths: list[str]) -> list[str]:
    """Return names that PEFT, which compares ends of text, takes for exactly these modules."""
    names = []
    for name in shortest_names(trained, paths):
        meant = {path for path in paths if path.endswith(name)}
        exact = {path for path in trained if path == name or path.endswith(f".{name}")}
        names.extend([name] if meant == exact else sorted(exact))
    return names


def _task(model: nn.Module) -> str | None:
    """Return PEFT's word for what the model does, where it has one that fits.

    Its class for SEQ_2_SEQ_LM hands on ``input_ids`` and ``decoder_input_ids`` only, which neither
    a speech model nor a vision-language model can be called with.
    """
    name = type(model).__name__
    task = next((task for ending, task in _TASKS if name.endswith(ending)), None)
    if task == "SEQ_2_SEQ_LM":
        config = getattr(model, "config", None)
        reads_text = getattr(model, "main_input_name", None) == "input_ids"
        return task if reads_text and getattr(config, "is_encoder_decoder", False) else None
    return task
