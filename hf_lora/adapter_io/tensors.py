"""An adapter's tensors as a file has them: under PEFT's keys, whole, of the configured sizes."""

from collections.abc import Collection, Mapping

import torch

from hf_lora.errors import SaveError, StateError, listing
from hf_lora.files.keys import PREFIX, without_wrappers
from hf_lora.files.safetensors_io import can_hold
from hf_lora.layers.roles import BESIDE
from hf_lora.layers.trained import own_tensors
from hf_lora.model.registry import Registry


def tensors_of(
    registry: Registry, name: str, state_dict: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under PEFT's keys."""
    gathered = _by_role(registry, name, state_dict) if state_dict is not None else None
    found = {}
    held = (tensor for *_, tensor in registry.tensors(name))
    for (path, _, role), tensor in zip(registry.roles(name), held, strict=True):
        found[key_of(path, role.key)] = tensor if gathered is None else gathered[path, role.name]
    return found


def key_of(path: str, key: str) -> str:
    """Return PEFT's name of a tensor that is called ``key`` below the path of its module.

    A key may say that it is below the path of the module above.
    """
    path = without_wrappers(path)
    if key.startswith(BESIDE):  # what PEFT has inside of the wrapper of the module above
        path, key = path.rpartition(".")[0], key.removeprefix(BESIDE)
    dotted = f"{path}." if path else ""
    return f"{PREFIX}{dotted}{key}"


def moved_buffers(registry: Registry, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the buffers that an adapter has moved, by their names in the model.

    Returns:
        Those that differ from the base's; and the names of those that a file cannot hold, to the
        reason.
    """
    found, left = {}, {}
    for path, module, role, copy in registry.held_buffers(name):
        ((_, base),) = own_tensors(module, (role,))
        full = ".".join(filter(None, (without_wrappers(path), role)))
        if copy.shape != base.shape:
            # PEFT, which puts it into the base, would not open the file
            left[full] = (
                f"its shape is {tuple(copy.shape)} now, and {tuple(base.shape)} in the base"
            )
        elif not can_hold(copy.dtype):
            left[full] = f"safetensors cannot hold {copy.dtype}"
        elif not torch.equal(copy, base.to(copy.device, copy.dtype)):
            found[full] = copy
    return found, left


def buffer_key(full: str, adapted: Collection[str]) -> str:
    """Return PEFT's key for a buffer, which of an adapted layer is one of the layer inside."""
    path, _, role = full.rpartition(".")
    inside = "base_layer" if path in adapted else ""
    return PREFIX + ".".join(filter(None, (path, inside, role)))


def check_shapes(registry: Registry, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise StateError if a tensor is not of the size that the adapter's configuration says."""
    problems = []
    for path, _, role in registry.roles(name):
        given = tuple(tensors[key_of(path, role.key)].shape)
        # one process's share, or a gather that left some out
        if given != role.shape:
            problems.append(f"{path}.{role.name} has shape {given} where {role.shape} is expected")
    if problems:
        raise StateError(
            listing(
                "These adapter tensors are not whole; are they one process's share?",
                problems,
                "Gather the adapter before saving. Nothing was written.",
            )
        )


def as_saved(key: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor in the type that it is saved in.

    Raises:
        StateError: Its numbers are not here.
    """
    if tensor.is_meta:
        raise StateError(f"{key} is on the meta device: it has no numbers that could be saved.")
    if hasattr(tensor, "device_mesh"):
        raise StateError(
            f"{key} is spread over several processes. Save with hf_lora.save(model, folder) in "
            "all of them, or with a state dict that was gathered."
        )
    value = tensor.detach()
    return value.to(dtype) if dtype and value.is_floating_point() else value


def check_finite(name: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Raise SaveError if a tensor is not finite, as a training that went to nan leaves it.

    Args:
        name: The adapter's.
        tensors: As they will be written.
        dtype: The type that was asked for, which may be too small.
    """
    bad = [
        key
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if bad:
        asked = f", or not in {dtype}" if dtype else ""
        raise SaveError(
            listing(
                f"The adapter {name!r} holds numbers that are not finite{asked}",
                bad,
                "Nothing could load such a file. Nothing was written: what was saved before is "
                "as it was.",
            )
        )


def _by_role(
    registry: Registry, name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[tuple[str, str], torch.Tensor]:
    found = {}
    missing = []
    plain = {without_wrappers(key): key for key in state_dict}
    for path, role, key in registry.keys(name):
        there = plain.get(without_wrappers(key))
        if there is None:
            missing.append(key)
        else:
            found[path, role] = state_dict[there]
    if missing:
        raise StateError(
            f"The state dict to save from lacks {len(missing)} adapter tensors (first: "
            f"{missing[0]}; it has {len(state_dict)} tensors). With DeepSpeed ZeRO-3, set "
            "stage3_gather_16bit_weights_on_model_save."
        )
    return found
