"""Buffers that a training moves: an adapter's own from then on, while the base keeps its values.

A router's balancing bias, a running mean of somebody's own, the ranges of an observer: they get no
gradient, a forward or a hook of the optimizer writes them, and what was trained is nothing without
them. Which of a model's buffers move cannot be known before. So what each holds before the first
step is kept, and compared wherever it matters: when adapters are switched, saved, added or taken
off, or a state dict is taken. One that has moved becomes the copy of the adapter that trained, the
very tensor, since whoever writes it may hold it; the base gets its values in another. No step pays
for that.

Not meant are buffers that no checkpoint holds (caches, masks), those of quantized layers, and
those of normalizations that are frozen (``layers.statistics``).
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from hf_lora.errors import TargetError
from hf_lora.layers.choice import Weights
from hf_lora.layers.holding import held_by, hold, hold_again, let_go, mixed, shares_of
from hf_lora.layers.known_buffers import Known, candidates, moved, note
from hf_lora.layers.names import copy_kind, parameter_name
from hf_lora.layers.weakly import Weakly

Registry = Any
"""`model.registry.Registry`, which stands above this module."""

_ASKED = 8
"""Of how many parameters of an adapter it is asked whether something has trained them."""

_LARGE = "it is too large for its values in the base to be kept beside it"


class Buffers:
    """The buffers of one base, and which adapter has which of them."""

    def __init__(self) -> None:
        self.known: list[Known] = []
        self.holding: dict[str, Weakly] = {}
        """Those of which adapters have buffers, by path."""

        self.begun = False
        """Whether a training has begun, so that what changes is no longer the base's own."""

        self._writes = 0
        """How often the adapters' parameters had been written to when the buffers were noted."""

        self.left: dict[str, str] = {}
        """Name of a buffer that moved, and that no adapter could have, to the reason."""

        self.told: set[str] = set()
        """Those of which a save has warned."""

    def note(self, model: nn.Module, registry: Registry) -> None:
        """Keep what every buffer holds, as long as no training has begun."""
        if not self.begun:
            self.known = note(model)
            self._writes = _writes(registry) if self.known else 0

    def note_again(self, model: nn.Module, registry: Registry) -> None:
        """Do so where they are noted, after something else than a training has written."""
        if self.known:
            self.note(model, registry)

    def begin(self, model: nn.Module, registry: Registry) -> None:
        """Keep it for good: now a training begins."""
        self.note(model, registry)
        self.begun = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def settle(self, registry: Registry) -> None:
        """Give what has moved since to the adapter that trains here and now, and put the base back.

        Where none does, as under ``no_adapter``, nothing of what was moved is kept. Before a
        training, what is written is the base's.
        """
        # a compiled loop, or one that calls parts of the model, has run no hook of ours
        self.begun = self.begun or _writes(registry) > self._writes
        if not self.begun:
            return
        merged = {id(original.module) for original in registry.originals}
        known = [each for each in self.known if each.name not in self.left]
        found = list(moved(each for each in known if id(each.module) not in merged))
        holder = _trains_here(registry) if found else None
        for each, now in found:
            self._settle(registry, holder, each, now)

    def _settle(
        self, registry: Registry, holder: str | None, known: Known, now: torch.Tensor
    ) -> None:
        module = known.module
        assert module is not None, "what stands there now is a buffer of it"
        if not known.whole:
            self.left[known.name] = _LARGE
            return
        if holder is not None and not _has(module, holder, known.role):
            try:
                self.give(registry, holder, known.path, module, known.role, now)
            except TargetError as error:
                self.left[known.name] = str(error)
                return
        its_own = [t for name in registry.adapters for t in held_by(module, name).values()]
        is_given = any(now is each for each in its_own)
        if is_given or now.shape != known.value.shape or now.is_inference():
            module._buffers[known.role] = known.base()
        else:
            now.copy_(known.value)

    def give(
        self,
        registry: Registry,
        adapter: str,
        path: str,
        module: nn.Module,
        role: str,
        copy: torch.Tensor | None = None,
    ) -> None:
        """Give an adapter its copy of a buffer, by default equal to what the base has there.

        Raises:
            TargetError: The module's class cannot be changed.
        """
        own = module._buffers[role]
        assert own is not None
        with torch.inference_mode(False):
            tensor = own.detach().clone() if copy is None else copy
            if tensor.is_inference():
                tensor = tensor.clone()  # or nothing could train through it
        self.holding[path] = Weakly(module)  # first: what nobody finds there would be lost
        hold(module, registry.routing, adapter, role, tensor)

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield path and module for all of which an adapter has buffers."""
        for path, held in self.holding.items():
            if held.module is not None:
                yield path, held.module

    def held(self, adapter: str) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
        """Yield (path, module, role, copy) for every buffer that an adapter has."""
        for path, module in self.modules():
            for role, copy in held_by(module, adapter).items():
                yield path, module, role, copy

    def drop(self, adapter: str) -> None:
        """Take the copies of an adapter away."""
        for _, module in self.modules():
            self.drop_from(module, adapter)

    def drop_from(self, module: nn.Module, adapter: str) -> None:
        """Take the copies that an adapter has of one module away."""
        if held_by(module, adapter):
            let_go(module, adapter)

    def reclass(self) -> None:
        """Put right what modules read, after the classes below were changed."""
        for _, module in self.modules():
            hold_again(module)

    def merged(
        self, chosen: Collection[str], weights: Weights, base: Callable[[nn.Module, str], Any]
    ) -> Iterator[tuple[nn.Module, dict[str, torch.Tensor]]]:
        """Yield each module of which an adapter among ``chosen`` has buffers, with merged ones.

        Args:
            chosen: The adapters.
            weights: All that are to be inside, with their factors.
            base: Returns what the base has of a module under a name.
        """
        for _, module in self.modules():
            roles = {role for name in chosen for role in held_by(module, name)}
            copies = {role: shares_of(module, role, weights) for role in sorted(roles)}
            found = {r: mixed(base(module, r), each).clone() for r, each in copies.items()}
            if found:
                yield module, found

    def clashes(self, factors: Mapping[str, float], inside: Collection[str]) -> Iterator[str]:
        """Yield a line for each buffer that adapters in use cannot have together.

        Args:
            factors: Those in use or inside the weights, each with its factor.
            inside: Those inside the weights, now or soon.
        """
        for path, module in self.modules():
            holders: dict[str, list[str]] = {}
            for name in factors:
                for role in held_by(module, name):
                    holders.setdefault(role, []).append(name)
            for role, names in holders.items():
                both = f"{path}.{role}: {', '.join(names)}"
                total = sum(factors[name] for name in names)
                if len(names) > 1 and not math.isclose(total, 1.0, abs_tol=1e-6):
                    yield both
                elif len({name in inside for name in names}) > 1:
                    yield f"{both} (some of them merged, and some not)"

    def make_room(
        self,
        model: nn.Module,
        registry: Registry,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        *_: Any,
    ) -> None:
        """Have adapters hold the buffers that they hold in a state dict; before it is loaded.

        What one holds that the state dict has not gets the base's value.
        """
        there = [each for each in candidates(model) if not each[3].is_meta]
        for path, module, role, tensor in there:
            for adapter in registry.adapters:
                copy = parameter_name(copy_kind(role), adapter)
                key = f"{prefix}{path}.{copy}" if path else f"{prefix}{copy}"
                if key not in state_dict and role in held_by(module, adapter):
                    state_dict[key] = tensor
                elif key in state_dict and not _has(module, adapter, role):
                    with contextlib.suppress(TargetError):
                        self.give(registry, adapter, path, module, role)


def _has(module: nn.Module, adapter: str, role: str) -> bool:
    """Say whether an adapter has a copy of a buffer, by itself or with the module in full."""
    in_full = getattr(module, "lora_copies", {}).get(adapter, {})
    return role in in_full or role in held_by(module, adapter)


def _trains_here(registry: Registry) -> str | None:
    """Return the first adapter in use here that trains."""
    for name, _ in registry.routing.now().live:
        if any(parameter.requires_grad for _, parameter in registry.parameters(name)):
            return name
    return None


def _writes(registry: Registry) -> int:
    """Return how often parameters of the adapters were written to; gradients are writes to come.

    A few of each are enough: a training moves all of them, and adapters are switched often.
    """
    each = (islice(registry.parameters(name), _ASKED) for name in registry.adapters)
    parameters = [parameter for some in each for _, parameter in some]
    grads = sum(parameter.grad is not None for parameter in parameters)
    return grads + sum(0 if p.is_inference() else p._version for p in parameters)
