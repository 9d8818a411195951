"""What hf_lora knows about a wrapped model: one object, kept as an attribute of that model."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn

from hf_lora.compat.deepspeed import is_engine, is_partitioned
from hf_lora.compat.dtensor import is_sharded
from hf_lora.compat.fsdp1 import check_no_fsdp1
from hf_lora.errors import ConfigError, StateError, UnknownAdapterError, listing
from hf_lora.kinds.token_rows import TrainedRows
from hf_lora.layers.input_groups import unwatch
from hf_lora.layers.instance_forward import has_foreign_forward
from hf_lora.layers.kind import Patched
from hf_lora.layers.names import REGISTRY
from hf_lora.layers.patched import is_ours
from hf_lora.layers.replaced import Replaced
from hf_lora.layers.roles import Role
from hf_lora.layers.routing import Routing
from hf_lora.layers.statistics import FrozenNorm
from hf_lora.layers.trained import TrainedModule
from hf_lora.model import watch
from hf_lora.model.adapter import Adapter
from hf_lora.model.adopted import Adopted
from hf_lora.model.buffers import Buffers
from hf_lora.model.by_path import ModulesByPath
from hf_lora.planning.cores import core_of
from hf_lora.planning.records import Adapted

_WRAPPERS = ("module", "_orig_mod")
_OUTSIDE = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclasses.dataclass
class Registry:
    """The adapters of one model and the modules that carry them."""

    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    routing: Routing = dataclasses.field(default_factory=Routing)
    modules: MutableMapping[str, Patched] = dataclasses.field(default_factory=ModulesByPath)
    """Path to module, for all that carry an adapter."""

    exclusive: dict[str, TrainedModule] = dataclasses.field(default_factory=dict)
    """Those of them on which adapters are not simply added up: modules trained in full."""

    rows: dict[str, TrainedRows] = dataclasses.field(default_factory=dict)
    """Those of which adapters train some rows."""

    norms: dict[str, FrozenNorm] = dataclasses.field(default_factory=dict)
    """The normalizations whose running statistics are kept still."""

    buffers: Buffers = dataclasses.field(default_factory=Buffers)
    """What the base's buffers were before a training could move them, and the adapters' own."""

    base_flags: dict[str, bool] = dataclasses.field(default_factory=dict)
    """``requires_grad`` of every base parameter before the model was wrapped."""

    originals: list[Replaced] = dataclasses.field(default_factory=list)
    """While merged: each changed module and what stood there before."""

    untied: list[Any] = dataclasses.field(default_factory=list)
    """While merged: the configurations that said ``tie_word_embeddings`` until then."""

    all_save: bool = False
    """While Trainer saves: every process has come to it, also those that will not write."""

    mesh: Any = None
    """Of a model under tensor parallelism: the processes over which adapters are spread."""

    places: watch.Places | None = None
    """Where the modules that carry adapters stood at the last forward."""

    gradients_checked: bool = False
    """While a Trainer runs whose first step says which tensors receive no gradient."""

    heard: set[Any] = dataclasses.field(default_factory=set)
    """The ways to compute in which an adapted output head was listened for."""

    repacked: list[tuple[nn.Module, Any]] = dataclasses.field(default_factory=list)
    """Quantized layers whose packing for inference was switched off, and what they said before."""

    adopted: list[Adopted] = dataclasses.field(default_factory=list)
    """Parameters of the base that were unfrozen, and are an adapter's copies until it goes."""

    given_back: list[tuple[nn.Parameter, bool]] = dataclasses.field(default_factory=list)
    """While the patch is taken off: parameters with another flag than before it, and their own."""

    methods: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the model object itself had under the names of methods that are replaced on it."""

    part: "tuple[str, Registry] | None" = None
    """Of a registry that is only seen from a model around its own: the own one's place and it."""

    merged_before: tuple[str, ...] = ()
    """The adapters that were merged into the base for good before it was wrapped."""

    def adapter(self, name: str) -> Adapter:
        """Return an adapter by name.

        Raises:
            UnknownAdapterError: There is none of that name; the message lists those there are.
        """
        if not isinstance(name, str) or name not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise UnknownAdapterError(f"This model has no adapter {name!r}; it has: {known}.")
        return self.adapters[name]

    def select(self, names: str | Iterable[str]) -> tuple[str, ...]:
        """Return one name or several as a tuple of known adapters, each once, in order.

        Raises:
            UnknownAdapterError, ConfigError: There is none of one of the names; they are weighed.
        """
        if isinstance(names, Mapping):
            raise ConfigError(f"Only names are wanted here, without factors, not {names!r}.")
        chosen = (names,) if isinstance(names, str) or not isinstance(names, Iterable) else names
        return tuple(dict.fromkeys(self.adapter(name).name for name in chosen))

    def tensors(self, name: str) -> Iterator[tuple[str, Patched, str, torch.Tensor]]:
        """Yield (path, module, role, tensor) for everything that adapter ``name`` holds."""
        for path in self.adapter(name).places:
            module = self.modules[path]
            for role, tensor in module.lora_tensors(name).items():
                yield path, module, role, tensor

    def roles(self, name: str) -> Iterator[tuple[str, Patched, Role]]:
        """Yield (path, module, role) for everything that adapter ``name`` holds, in that order."""
        for path in self.adapter(name).places:
            module = self.modules[path]
            for role in module.lora_roles(name):
                yield path, module, role

    def keys(self, name: str) -> Iterator[tuple[str, str, str]]:
        """Yield (path, role, key in the model's state dict) for everything of ``name``."""
        for path, _, role in self.roles(name):
            yield path, role.name, f"{path}.{role.held}" if path else role.held

    def parameters(self, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (full name in the model, Parameter) for everything of ``name`` that can train."""
        for (*_, key), (*_, tensor) in zip(self.keys(name), self.tensors(name), strict=True):
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                yield key, tensor

    def adapted(self) -> Adapted:
        """Return where on the model its adapters are."""
        full, rows = self.exclusive.keys(), self.rows.keys()
        stood = {id(original.module): original.tensors for original in self.originals}
        return Adapted(self.modules.keys() - full - rows, full, rows, stood)

    def retie(self, name: str) -> None:
        """Have what is tied read an adapter's one copy, also where something gave each its own."""
        for (path, role), (top, source) in self.adapter(name).ties.items():
            copy = self.exclusive[top].lora_copy(name)[source]
            self.exclusive[path].lora_share_copy(name, role, copy)
        for path, rows in self.adapter(name).rows.items():
            if rows.of is not None:
                self.rows[path].lora_share_rows(name, self.rows[rows.of].lora_rows_of(name))

    def all_parameters(self) -> dict[int, str]:
        """Return id to adapter for every tensor of every adapter: what is LoRA's, by identity."""
        return {id(t): name for name in self.adapters for *_, t in self.tensors(name)}

    def settle_buffers(self) -> None:
        """Give each buffer that a training has moved to the adapter that trained."""
        real = self if self.part is None else self.part[1]
        if real.buffers.known:
            real.buffers.settle(real)

    def held_buffers(self, name: str) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
        """Yield (path, module, role, copy) for every buffer of the base that an adapter has."""
        lead = "" if self.part is None else self.part[0]
        for path, module, role, copy in self.buffers.held(name):
            yield ".".join(filter(None, (lead, path))), module, role, copy

    def put_weights_back(self, model: nn.Module, changed: int = 0, untied: int = 0) -> None:
        """Undo merges, also one that stopped halfway.

        Args:
            model: The model.
            changed: How many of the modules that were changed first are left as they are.
            untied: How many of the configurations.
        """
        for original in reversed(self.originals[changed:]):
            original.put_back()
        for config in self.untied[untied:]:
            config.tie_word_embeddings = True
        del self.originals[changed:], self.untied[untied:]
        if not changed:
            self.routing.merge(())

    def keep_merged(self) -> None:
        """Forget what stood in the weights before a merge."""
        self.originals = []  # another list: who undoes this asks the old one
        self.untied.clear()
        self.routing.merge(())

    def check_unmerged(self, action: str, adapters: Iterable[str] | None = None) -> None:
        """Raise StateError if adapters (any, or one of these) are inside the weights now."""
        merged = self.routing.merged
        if merged and (adapters is None or set(adapters) & set(merged)):
            names = ", ".join(merged)
            raise StateError(
                f"Cannot {action} while {names} is merged into the weights; "
                "call hf_lora.unmerge(model) first."
            )

    def check_in_place(self, model: nn.Module) -> None:
        """Raise StateError if a patched module was replaced, hidden, resized or offloaded since."""
        problems = []
        there = set(model.modules())
        for path, module in self.modules.items():
            gone = None if module in there else "is no longer part of the model: it was replaced"
            if fault := gone or _misfit(module):
                problems.append(f"{path or 'the model itself'} {fault}")
        copies = self.exclusive
        problems += [
            f"{path} has a copy of its own of what is tied with {top}: call model.tie_weights()"
            for name, adapter in self.adapters.items()
            for (path, role), (top, source) in adapter.ties.items()
            if copies[path].lora_copy(name)[role] is not copies[top].lora_copy(name)[source]
        ]
        problems += [
            f"{path} has rows of its own of what is tied with {rows.of}"
            for name, adapter in self.adapters.items()
            for path, rows in adapter.rows.items()
            if rows.of is not None
            and self.rows[path].lora_rows_of(name) is not self.rows[rows.of].lora_rows_of(name)
        ]
        if problems:
            raise StateError(
                listing(
                    "Adapted layers of this model are not what they were",
                    problems,
                    "Convert, quantize, replace or resize layers before wrapping; hf_lora.unwrap "
                    "takes the adapters off, and what is in a folder loads again afterwards.",
                )
            )

    def check_classes(self, *names: str) -> None:
        """Raise StateError if another library has taken hold since of what would be taken away.

        Args:
            *names: Adapters that would be; FSDP2 puts what it shards back in the next forward.
        """
        held = dict(self.modules)
        if self.adapters.keys() <= set(names):
            held |= self.norms
        changed = {
            path: type(module).__name__
            for path, module in held.items()
            if not is_ours(module) and set(module.lora_adapters()) <= set(names)
        }
        changed |= {
            path: f"the {role} of {name!r} is sharded"
            for name in names
            for path, _, role, tensor in self.tensors(name)
            if is_partitioned(tensor) or (is_sharded(tensor) and tensor.device_mesh != self.mesh)  # type: ignore[attr-defined]
        }
        problems = [f"{path or 'the model itself'}: {what}" for path, what in changed.items()]
        if problems:
            raise StateError(
                listing(
                    "Another library has changed these layers since (parametrized or sharded them)",
                    problems,
                    "Undo that first; what it did would be lost.",
                )
            )


def _misfit(module: Patched) -> str | None:
    if has_foreign_forward(module):
        return "has a forward of another library's on the instance now, which hides its adapter"
    for name in module.lora_added():
        tensor = module._parameters.get(name)
        if tensor is not None and tensor.is_meta:
            return "had its adapter offloaded with it"
    return module.lora_misfit()


def find(model: nn.Module) -> tuple[nn.Module, Registry] | None:
    """Return the wrapped model and its registry, or None.

    Looks through DDP, torch.compile and the modules of sentence-transformers.
    """
    for inner in inwards(model):
        registry = inner.__dict__.get(REGISTRY)
        if registry is not None:
            return inner, registry
    return None


def inwards(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a model and, from the outside in, those that it is only a wrapper around."""
    while isinstance(model, nn.Module):
        yield model
        inner = [model._modules[name] for name in _WRAPPERS if model._modules.get(name) is not None]
        alone = len(inner) == 1 and len(model._modules) == 1
        model = inner[0] if alone else core_of(model)  # type: ignore[assignment]


def returned_by_wrap(model: nn.Module, inner: nn.Module) -> nn.Module:
    """Return what ``wrap`` gave back for a wrapped model: of sentence-transformers the whole."""
    return next((each for each in inwards(model) if core_of(each) is inner), inner)


def is_wrapped(model: nn.Module) -> bool:
    """Say whether this very module was given to ``wrap`` or ``load``."""
    return REGISTRY in vars(model)


def registry_of(model: nn.Module) -> Registry:
    """Return the registry of a wrapped model.

    Raises:
        StateError: The model is not wrapped.
    """
    return wrapped(model)[1]


def wrapped(model: nn.Module) -> tuple[nn.Module, Registry]:
    """Return the wrapped model itself, out of DDP or torch.compile, and its registry.

    Raises:
        StateError: The model is not wrapped.
    """
    if (found := find(model)) is None:
        raise StateError(
            f"This {type(model).__name__} is not wrapped; call hf_lora.wrap(model, ...) or "
            "hf_lora.load(model, ...) first."
        )
    return found


def check_fresh(model: nn.Module) -> None:
    """Raise StateError if the model, a part of it or a wrapper around it rules out wrapping it."""
    if not isinstance(model, nn.Module):
        raise StateError(f"Only an nn.Module can be wrapped, not {model!r}.")
    if find(model) is not None:
        raise StateError(
            f"This {type(model).__name__} is wrapped already; use hf_lora.add_adapter(model, name) "
            "for another adapter, or hf_lora.unwrap(model) to begin anew."
        )
    check_no_fsdp1(model)
    outside = isinstance(model, _OUTSIDE) or "_orig_mod" in model._modules
    if outside or is_engine(model):
        raise StateError(
            f"This is a {type(model).__name__} around a model; wrap the model first, so that "
            "its adapters are synchronized and compiled with it."
        )
    if "_pp_stage" in vars(model):
        raise StateError(
            "Pipeline parallelism has left this process some layers of the model, so that it would "
            "train and save a part of an adapter; use tp_size or fsdp_size instead."
        )
    for path, module in model.named_modules():
        if isinstance(module, Patched):
            raise StateError(
                f"{path or 'This layer'} carries an adapter already, put there by itself or as "
                "part of another model; unwrap that first."
            )


def create(model: nn.Module) -> Registry:
    """Put a new registry on the model and freeze the base, remembering every flag.

    Raises:
        StateError: As for :func:`check_fresh`.
    """
    check_fresh(model)
    registry = Registry()
    registry.routing.owned = True
    for name, parameter in model.named_parameters(remove_duplicate=False):
        registry.base_flags[name] = parameter.requires_grad
    for parameter in model.parameters():
        parameter.requires_grad = False  # the method of that name fails on lazy modules
    model.__dict__[REGISTRY] = registry
    registry.routing.enlist()
    registry.routing.sharing.watch(model)
    watch.watch(model)
    return registry


def pop_registry(model: nn.Module) -> Registry:
    """Take the registry off the model and return it."""
    unwatch(model)
    watch.unwatch(model)
    return model.__dict__.pop(REGISTRY)
