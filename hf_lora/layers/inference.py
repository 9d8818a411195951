"""A few rows through a linear layer and its updates where no gradient is recorded: generation.

What is computed is so little that finding out how to compute it would take longer. So this is one
function of its own, tried before all other ways; what it does not know it leaves to them.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from hf_lora.compat.torch_execution import in_transform
from hf_lora.functional.composed import FEW_ROWS
from hf_lora.layers.fusing import PLAIN, multiplies

if TYPE_CHECKING:
    from hf_lora.kinds.lora import LoRALayer


def at_inference(layer: "LoRALayer", x: torch.Tensor) -> torch.Tensor | None:
    """Return the layer's output with what its adapters add, or None where another way must.

    The sum of all updates is made in float32 (where a processor has 16-bit tensors) and rounded
    once, with the base's output. Of the factors nothing is kept from call to call, so whoever
    writes them, in whatever way, is heard.
    """
    routing = layer.lora_routing
    if (
        type(x) not in PLAIN
        or torch.compiler.is_compiling()
        or routing.plain
        or routing.biased
        or not x.is_floating_point()
        or x.dim() == 0
        or x.numel() > FEW_ROWS * x.size(-1)
        or torch.is_autocast_enabled(x.device.type)
        or in_transform()
    ):
        return None
    slots, wide, update = layer.lora_slots, x, None
    for name, factor in routing.now().live:
        slot = slots.get(name)
        if slot is None:
            continue
        a_RI, b_OR = layer.lora_pair(name)
        if (slot.dropout and layer.training) or type(a_RI) not in PLAIN:
            return None
        if wide is x and x.dtype.itemsize == 2 and x.is_cpu:
            wide = x.float()
        if a_RI.dtype is not wide.dtype or b_OR.dtype is not wide.dtype:
            a_RI, b_OR = a_RI.to(wide.dtype), b_OR.to(wide.dtype)
        one, s = F.linear(F.linear(wide, a_RI), b_OR), slot.scaling * factor
        if update is not None:
            update.add_(one, alpha=s)
        elif len(routing.now().live) == 1:
            return _base(layer, x, one, s)
        else:
            update = one.mul_(s)
    return layer.lora_base(x) if update is None else _base(layer, x, update, 1.0)


def _base(layer: "LoRALayer", x: torch.Tensor, update: torch.Tensor, s: float) -> torch.Tensor:
    """Return the host's output plus ``s`` times an update."""
    own = layer._parameters
    if layer.lora_host is nn.Linear and "weight" in own:
        # past nn.Module's search for attributes, which takes as long as a small product
        y = F.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
    else:
        y = layer.lora_base(x)
        if not multiplies(layer.lora_host) or type(y) not in PLAIN:
            # somebody else's: it may be kept elsewhere, or be no tensor of the common kind
            return (y + update * s).to(y.dtype)
    return y.add_(update, alpha=s)
