"""What a wrapped model has: counts, bytes and norms per adapter, from the live tensors."""

import collections
import dataclasses

import torch
from torch import nn

from hf_lora.compat.deepspeed import numel_of
from hf_lora.compat.dtensor import gather_full
from hf_lora.layers.dispatch import WAYS
from hf_lora.layers.token_rows import ROWS
from hf_lora.model.registry import Registry, wrapped
from hf_lora.planning.records import size
from hf_lora.planning.ties import followers


@dataclasses.dataclass(frozen=True)
class AdapterSummary:
    """One adapter of a model."""

    name: str
    active: bool
    factor: float
    """What its updates are multiplied by where it is in use: see :func:`hf_lora.activate`."""

    merged: bool
    trainable: bool
    layers: int
    trained: tuple[str, ...]
    tied: tuple[str, ...]
    """Paths of the modules that are tied with those in ``trained``, and train with them."""

    biases: int
    """How many biases train beside A and B, and outside of ``trained``."""
    rows: dict[str, int]
    """Path of each module of which some rows are trained, to how many; also of tied ones."""

    parameters: int
    bytes: int
    norms: dict[str, float]
    """Path of each layer to the Frobenius norm of its update ``s · B A``, or of what rows of it are
    away from the base's."""

    @property
    def dead(self) -> list[str]:
        """Paths of the layers whose update is exactly zero: never trained, or not loaded."""
        return [path for path, norm in self.norms.items() if norm == 0.0]


@dataclasses.dataclass(frozen=True)
class Summary:
    """A wrapped model. ``print(summary)`` shows it as text."""

    model: str
    base_parameters: int
    adapters: tuple[AdapterSummary, ...]
    computed: dict[str, str]
    """Path of each adapted layer to how it computes: see ``layers.dispatch.how_computed``."""

    traced: bool
    """Whether layers that read the same tensor were looked for, as the first training step does."""

    def __str__(self) -> str:
        """Return a line for the model and two for each adapter."""
        lines = [f"{self.model}: {self.base_parameters:,} parameters of the base, frozen"]
        for adapter in self.adapters:
            states = [
                "active" if adapter.active else "inactive",
                *([f"times {adapter.factor:g}"] if adapter.factor != 1 else []),
                "training" if adapter.trainable else "frozen",
                *(["merged"] if adapter.merged else []),
            ]
            lines.append(
                f"  {adapter.name}: {', '.join(states)}; {adapter.layers} layers, "
                f"{adapter.parameters:,} parameters, {size(adapter.bytes)}"
            )
            if adapter.trained:
                tied = f", tied with {', '.join(adapter.tied)}" if adapter.tied else ""
                lines.append(f"    in full: {', '.join(adapter.trained)}{tied}")
            if adapter.biases:
                lines.append(f"    biases: {adapter.biases}")
            if adapter.rows:
                counts = ", ".join(f"{count} of {path}" for path, count in adapter.rows.items())
                lines.append(f"    rows: {counts}")
            if adapter.norms:
                values = sorted(adapter.norms.values())
                lines.append(
                    f"    norm of the updates: {values[0]:.3g} to {values[-1]:.3g}, "
                    f"{len(adapter.dead)} layers unchanged"
                )
        kinds = collections.Counter(self.computed.values())
        told = [f"{kinds[way.name]} {way.words}" for way in WAYS if kinds[way.name]]
        if told:
            later = "" if self.traced else " (groups are looked for at the first training step)"
            lines.append(f"  computed: {', '.join(told)}{later}")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Return counts, bytes, states and the norms of every adapter's updates.

    If adapters are spread over several processes, all of them must call this.

    Raises:
        StateError: The model is not wrapped.
    """
    inner, registry = wrapped(model)
    added = registry.all_parameters()
    chosen = dict(registry.routing.now().chosen)
    found = []
    for name, adapter in registry.adapters.items():
        tensors = [tensor for *_, tensor in registry.tensors(name)]
        found.append(
            AdapterSummary(
                name=name,
                active=name in chosen,
                factor=chosen.get(name, 1.0),
                merged=name in registry.routing.merged,
                trainable=any(tensor.requires_grad for tensor in tensors),
                layers=len(adapter.slots),
                trained=adapter.trained,
                tied=tuple(followers(adapter.ties, adapter.trained)),
                biases=sum(s.bias + s.lora_bias for s in adapter.slots.values())
                + len(adapter.biases),
                rows={path: len(own.ids) for path, own in adapter.rows.items()},
                parameters=sum(map(numel_of, tensors)),
                bytes=sum(numel_of(tensor) * tensor.element_size() for tensor in tensors),
                norms=_norms(registry, name),
            )
        )
    base = sum(numel_of(p) for p in inner.parameters() if id(p) not in added)
    sharing = registry.routing.sharing
    grouped = sharing.grouped()
    said = {path: module.lora_how(grouped) for path, module in registry.modules.items()}
    computed = {path: how for path, how in said.items() if how is not None}
    return Summary(type(inner).__name__, base, tuple(found), computed, sharing.traced)


@torch.no_grad()
def _norms(registry: Registry, name: str) -> dict[str, float]:
    """Return path to the norm of one adapter's update, for each layer that has one."""
    slots = registry.adapter(name).slots
    whole: dict[str, dict[str, torch.Tensor]] = {path: {} for path in slots}
    rows = {path for path, own in registry.adapter(name).rows.items() if own.of is None}
    held = {(p, role): t for p, _, role, t in registry.tensors(name) if p in slots or p in rows}
    for (path, role), tensor in gather_full(held).items():
        whole.setdefault(path, {})[role] = tensor
    stood = {id(original.module): original.read("weight") for original in registry.originals}
    steps = {
        path: (whole[path][ROWS] - module.lora_old(name, stood.get(id(module)))).double().norm()
        for path, module in registry.rows.items()
        if path in rows
    }
    return {path: float(step) for path, step in steps.items()} | {
        path: registry.modules[path].lora_layout.norm(whole[path], slot)
        for path, slot in slots.items()
    }
