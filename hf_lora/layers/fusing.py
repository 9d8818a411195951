"""A layer's base and updates in one function, alone or together with others, where that can be."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lora.compat.accelerate import is_placed
from hf_lora.compat.torch_kernels import has_products
from hf_lora.compat.torch_modules import is_replica
from hf_lora.functional.composed import composed, is_small
from hf_lora.functional.fused import Layer, Update, fused
from hf_lora.functional.recompute import Recompute, recompute_of, recomputed
from hf_lora.layers.tensor_parallel import draws_apart

if TYPE_CHECKING:
    from hf_lora.kinds.lora import LoRALayer

PLAIN = (torch.Tensor, nn.Parameter)
"""The types of tensors that are nobody's special kind."""


def compute_type(x: torch.Tensor) -> torch.dtype:
    """Return the type that a linear layer computes in: autocast's where that is on."""
    kind = x.device.type
    if (
        x.dtype != torch.float64
        and torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
    ):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def update_type(kind: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type for the narrow products of an update where a layer computes in ``dtype``.

    Args:
        kind: The kind of device.
        dtype: What :func:`compute_type` returned.
    """
    narrow = kind == "cpu" and dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow and not has_products(dtype) else dtype


def precomputed(layer: "LoRALayer", x: torch.Tensor) -> torch.Tensor | None:
    """Return what another layer that reads the same tensor has computed for this one, or None."""
    sharing = layer.lora_routing.sharing
    return sharing.take(layer, x, _conditions(layer, compute_type(x)))


def _conditions(layer: "LoRALayer", dtype: torch.dtype) -> tuple[Any, ...]:
    """Return what must be the same when an output is taken as when it was computed."""
    return dtype, layer.lora_routing.now()


def fused_forward(
    layer: "LoRALayer", updates: Sequence[Update], x: torch.Tensor
) -> torch.Tensor | None:
    """Return the layer's output from one function for base and updates, or None if it cannot be.

    In training the layer computes for those that read the same tensor, too.
    """
    dtype = compute_type(x)
    own = _with_weight(layer, updates, x, dtype)
    if own is None:
        return None
    if not torch.is_grad_enabled() or is_apart(layer) or x.is_inference():
        return _compute(layer, x, [own], dtype)[0]
    sharing = layer.lora_routing.sharing
    group: list[LoRALayer] = [layer]
    layers = [own]
    for other in cast("list[LoRALayer]", sharing.followers(layer)):
        if group[-1]._forward_hooks or other._forward_pre_hooks:
            break  # one that runs before the next layer may write x through .data
        found = _as_follower(layer, other, x, dtype)
        if found is not None:
            group.append(other)
            layers.append(found)
    outputs = _compute(layer, x, layers, dtype)
    if len(group) > 1:
        sharing.put(group, x, _conditions(layer, dtype), outputs)
    return outputs[0]


def fused_on_top(
    layer: "LoRALayer", updates: Sequence[Update], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor | None:
    """Return the host's own output ``y`` with the updates added, or None if it cannot be."""
    dtype = compute_type(x)
    if type(y) not in PLAIN or y.dtype != dtype or y.shape[:-1] != x.shape[:-1]:
        return None
    if not _same_device(updates, x):
        return None
    return _compute(layer, x, [Layer(updates, y=y)], dtype)[0]


def _compute(
    layer: "LoRALayer", x: torch.Tensor, layers: Sequence[Layer], dtype: torch.dtype
) -> Sequence[torch.Tensor]:
    if is_small(x, layers):
        return composed(x, layers)
    update_dtype = update_type(x.device.type, dtype)
    if not torch.is_grad_enabled():
        return fused(x, layers, dtype, update_dtype=update_dtype)
    hooked = layer.lora_routing.sharing.hooks.any()
    recipe = None if hooked else _recipe(layer, x)
    return fused(x, layers, dtype, recipe, update_dtype=update_dtype, keep_h=hooked)


def _with_weight(
    layer: "LoRALayer", updates: Sequence[Update], x: torch.Tensor, dtype: torch.dtype
) -> Layer | None:
    """Return the layer as one product with its weight, if that is all that its host does."""
    if not multiplies(layer.lora_host) or not _same_device(updates, x):
        return None
    weight, bias = layer.lora_own("weight"), layer.lora_own("bias")
    for tensor in (weight, bias):
        if not is_frozen(tensor):
            return None
        if tensor is not None and (
            tensor.device != x.device
            or (tensor.dtype != dtype and (dtype == x.dtype or not tensor.is_floating_point()))
        ):
            return None
    if x.shape[-1] != weight.shape[0 if layer.fan_in_fan_out else 1]:
        return None  # the host's own error says it best
    return Layer(updates, weight.t() if layer.fan_in_fan_out else weight, bias)


def is_frozen(tensor: torch.Tensor | None) -> bool:
    """Say whether a weight or bias is an ordinary one that does not train, or is not there."""
    return tensor is None or (type(tensor) in PLAIN and not tensor.requires_grad)


def _same_device(updates: Sequence[Update], x: torch.Tensor) -> bool:
    return all(
        type(u.a_RI) in PLAIN and type(u.b_OR) in PLAIN and u.a_RI.device == x.device
        for u in updates
    )


def _as_follower(
    leader: "LoRALayer", other: "LoRALayer", x: torch.Tensor, dtype: torch.dtype
) -> Layer | None:
    """Return another layer of the group as it will be when its turn comes, or None."""
    if vars(other).get("lora_routing") is not leader.lora_routing or is_apart(other):
        return None
    if not hasattr(other, "lora_updates"):  # one that is trained itself, beside adapted ones
        return None
    updates = other.lora_updates()
    if not updates or draws_apart(other, (update.dropout for update in updates)):
        return None
    return _with_weight(other, updates, x, dtype)


def is_apart(layer: nn.Module) -> bool:
    """Say whether the layer must compute alone: placed by device hooks, or a replica."""
    return is_placed(layer) or is_replica(layer)


@functools.cache
def multiplies(host: type[nn.Module]) -> bool:
    """Say whether a host's forward is the plain product with its weight."""
    # TorchScript's classes have none
    return getattr(host, "forward", None) in (nn.Linear.forward, Conv1D.forward)


def _recipe(layer: "LoRALayer", x: torch.Tensor) -> Recompute | None:
    """Return how ``x`` can be rebuilt; what was never tried on this layer is tried first."""
    recipe = recompute_of(x)
    if recipe is None:
        return None
    sharing = layer.lora_routing.sharing
    proven = sharing.is_proven(layer, recipe.expression)
    if proven is None:
        with torch.no_grad():
            again = recomputed(recipe.expression, recipe.kept).reshape(x.shape)
        proven = again.dtype == x.dtype and torch.equal(again, x)
        sharing.prove(layer, recipe.expression, proven)
    return recipe if proven else None
