"""What a model's buffers held before a training could move them, and which have moved since."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.compat.accelerate import is_offloaded
from hf_lora.layers.hosts import features
from hf_lora.layers.statistics import FrozenNorm
from hf_lora.layers.trained import tensor_names
from hf_lora.layers.weakly import Weakly

MOST_BYTES = 2**26
"""How much of a base's buffers is kept, the smallest first: 64 MiB."""

_SAMPLE = 4096
"""Of those that are larger: how many of their numbers are kept, to see that they move."""


@dataclasses.dataclass
class Known:
    """A buffer of the base, and what it held before the training."""

    path: str
    held: Weakly
    role: str
    value: torch.Tensor
    """A copy of that, or of some of its numbers."""

    whole: bool

    @property
    def module(self) -> nn.Module | None:
        """The module that has it, or None if it is gone."""
        return self.held.module

    @property
    def name(self) -> str:
        """Its name in the model."""
        return f"{self.path}.{self.role}" if self.path else self.role

    def now(self) -> torch.Tensor | None:
        """Return what stands on the base, never an adapter's copy."""
        module = self.module
        return None if module is None else module._buffers.get(self.role)

    def differs(self, now: torch.Tensor) -> torch.Tensor | None:
        """Return whether the values are others, on their device, or None if the sizes are."""
        there = now.detach() if self.whole else _sample(now)
        if there.shape != self.value.shape:
            return None
        # a model that was cast has the same numbers, to the precision of its new type
        then = self.value.to(there.device, there.dtype)
        if there.dtype.is_floating_point and there.dtype.itemsize == 1:
            there, then = there.view(torch.uint8), then.view(torch.uint8)
        return ((there != then) & ((there == there) | (then == then))).any()  # nan stays nan

    def base(self) -> torch.Tensor:
        """Return a new tensor with the base's values, as the model is now."""
        now = self.now()
        like = self.value if now is None else now
        return self.value.to(like.device, like.dtype, copy=True)


@torch.inference_mode(False)
@torch.no_grad()
def note(model: nn.Module) -> list[Known]:
    """Return what every buffer holds that a training may move: copies of ``MOST_BYTES`` at most."""
    found, size = [], 0
    there = [each for each in candidates(model) if not each[3].is_meta]
    for path, module, role, tensor in sorted(there, key=lambda each: each[3].nbytes):
        size += tensor.nbytes
        whole = size <= MOST_BYTES
        value = tensor.detach().clone() if whole else _sample(tensor).clone()
        found.append(Known(path, Weakly(module), role, value, whole))
    return found


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Yield (path, module, role, tensor) for every buffer that a training may move for good."""
    for path, module in model.named_modules():
        if not _is_left_out(module):
            for role in tensor_names(module):
                tensor = module._buffers.get(role)
                if type(tensor) is torch.Tensor:
                    yield path, module, role, tensor


def moved(all_known: Iterable[Known]) -> Iterator[tuple[Known, torch.Tensor]]:
    """Yield those whose values are others, with what stands there now; asks each device once.

    The values are compared, and not how often they were written: a write through ``.data``, as in
    many codebooks that follow a mean, is counted nowhere.
    """
    flags: dict[torch.device, list[tuple[Known, torch.Tensor, torch.Tensor]]] = {}
    for known in all_known:
        now = known.now()
        if now is None or now.is_meta:
            continue
        flag = known.differs(now)
        if flag is None:
            yield known, now
        else:
            flags.setdefault(flag.device, []).append((known, now, flag))
    for found in flags.values():
        answers = torch.stack([flag for *_, flag in found]).tolist()
        for (known, now, _), has_moved in zip(found, answers, strict=True):
            if has_moved:
                yield known, now


def _is_left_out(module: nn.Module) -> bool:
    if not module._buffers or isinstance(module, (torch.jit.ScriptModule, FrozenNorm)):
        return True
    return is_offloaded(module) or _is_packed(module)


def _is_packed(module: nn.Module) -> bool:
    """Say whether a linear layer has no matrix of ordinary numbers: its buffers hold it, packed."""
    return features(module) is not None and not any(
        p is not None and not is_lazy(p) and p.dim() == 2 and p.dtype.itemsize > 1
        for p in module._parameters.values()
    )


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(len(flat) // _SAMPLE, 1)]
