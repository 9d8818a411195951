"""Modules trained in full beside an adapter, such as a fresh head: copies instead of the originals.

The base's own parameters stay where they are, with their names and values. Reading ``weight`` gives
the active adapter's copy, whoever reads it (the module's own forward, or code outside that
uses ``model.lm_head.weight``), because the swapped class has a property of that name. Modules that
share a tensor of the base share its copy as well, unless an adapter's file has one for each.
"""

import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from hf_lora.compat.deepspeed import shape_of
from hf_lora.compat.dtensor import full_tensor, gather_full, is_distributed, is_sharded
from hf_lora.compat.torch_modules import is_replica
from hf_lora.compat.transformers import mark_filled
from hf_lora.layers.choice import Weights
from hf_lora.layers.hosts import SIXTEEN_BIT, has_float_weight
from hf_lora.layers.kind import Patched, added_names, parameter_of
from hf_lora.layers.names import copy_kind, parameter_name
from hf_lora.layers.replaced import Replaced, Tensors, in_place_of
from hf_lora.layers.roles import IN_FULL, IN_FULL_VECTORS, OWN_BIAS, Group, Role
from hf_lora.layers.statistics import training_if
from hf_lora.layers.tensor_parallel import as_distributed, split_fault, split_of, to_local


class TrainedModule(Patched):
    """Mixin whose parameters and persistent buffers read as the active adapter's own copies."""

    lora_prefix = "Trained"
    lora_adds_up = False

    lora_copies: dict[str, dict[str, str]]
    """Adapter to (name of a tensor to the name of the adapter's copy of it).

    Some tensors only, where the module is not trained itself, but shares these with one that is.
    """

    lora_tied: dict[str, frozenset[str]]
    """Adapter to the tensors of which the copy belongs to another module, and is seen here too."""

    @classmethod
    def lora_fields(cls, host: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
        """Return one property for each tensor of the module."""
        fields = {name: property(_reader(name), _writer(name)) for name in names}
        if issubclass(host, _NormBase):
            fields["training"] = training_if(TrainedModule.lora_trains)
        return fields

    def lora_added(self) -> set[str]:
        """Return the names of the copies that this module has."""
        return {held for copies in self.lora_copies.values() for held in copies.values()}

    def lora_copied(self, adapter: str | None = None) -> set[str]:
        """Return the tensors that some adapter, or this one, has a copy of."""
        chosen = self.lora_copies.keys() if adapter is None else self.lora_copies.keys() & {adapter}
        return {name for each in chosen for name in self.lora_copies[each]}

    def lora_adapters(self) -> Collection[str]:
        """Return the adapters that have copies here."""
        return self.lora_copies.keys()

    def lora_roles(self, adapter: str) -> tuple[Role, ...]:
        """Return the module's own tensors, each under its own name."""
        return tuple(
            Role(name, held, shape_of(tensor), name, self._group(name, tensor))
            for name, held in self.lora_copies[adapter].items()
            if name not in self.lora_tied.get(adapter, ())
            for tensor in (stored(self, held),)
        )

    def _group(self, name: str, tensor: torch.Tensor) -> Group:
        # Trainer goes by names; a shape also tells the norms whose names it does not know
        vector = tensor.ndim < 2 or isinstance(self, nn.LayerNorm) or name.endswith("bias")
        return IN_FULL_VECTORS if vector else IN_FULL

    def lora_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return role to this process's part of the copy."""
        tied = self.lora_tied.get(adapter, ())
        return {name: copy for name, copy in self.lora_copy(adapter).items() if name not in tied}

    def lora_is_at_start(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Say whether the copies are what the base has."""
        base = gather_full(dict(own_tensors(self, tuple(tensors))))
        return all(torch.equal(t, base[name].to(t)) for name, t in tensors.items())

    def lora_clash(self, shares: Mapping[str, float], merged: Collection[str]) -> str | None:
        """Return why copies cannot be mixed so, or None."""
        # what only their biases differ in adds up, as low-rank updates do
        whole = any(self.lora_copied(name) != {OWN_BIAS} for name in shares)
        if whole and len(shares) > 1 and not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
            return ""
        if len({name in merged for name in shares}) > 1:
            return "some of them merged, and some not"
        if self.lora_fresh and shares and sum(shares.values()) <= 0:
            return "it is fresh, and there is nothing to take it away from"
        if whole and any(factor != 1.0 for factor in shares.values()) and self.lora_counts():
            return f"it counts in {', '.join(self.lora_counts())}"
        return None

    def lora_split(self, adapter: str, mesh: Any) -> list[nn.Parameter]:
        """Make the copies DTensors, whole everywhere."""
        for role in self.lora_roles(adapter):
            copy = self._parameters.get(role.held)
            if copy is not None:
                self._parameters[role.held] = as_distributed(copy, mesh)
        return []

    def lora_merge_fault(self) -> str | None:
        """Return whether the module is spread, or None."""
        if any(is_distributed(tensor) for _, tensor in own_tensors(self, self.lora_names)):
            return "its tensors are spread over several processes"
        return None

    @torch.no_grad()
    def lora_merged(self, adapters: Weights, replaced: Replaced | None) -> Tensors:
        """Return the adapters' copies, to stand in the place of the module's own tensors."""
        merged: Tensors = {}
        for name, tensor in own_tensors(self, self.lora_names):
            copies = [
                (full_tensor(c.detach()), factor) for c, factor in self.lora_read(name, adapters)
            ]
            if not copies:
                continue
            one = len(copies) == 1 and copies[0][1] == 1.0
            data = copies[0][0].clone() if one else mixture(full_tensor(tensor.detach()), copies)
            original = parameter_of(self, name)
            data = data.to(tensor.dtype)
            merged[name] = data if original is None else in_place_of(original, data)
        return merged

    def lora_made_of(self, name: str, adapters: Weights) -> Hashable:
        """Return the copies that a tensor is a mixture of, and the base's if that is in it."""
        copies = tuple((id(copy), factor) for copy, factor in self.lora_read(name, adapters))
        left = math.fsum([factor for _, factor in copies]) != 1.0
        return (*copies, id(stored(self, name)) if left else None) if copies else None

    def lora_add_copy(
        self, adapter: str, names: Iterable[str], dtype: torch.dtype | None = None
    ) -> None:
        """Give ``adapter`` its own copy of tensors of the module, equal to the base's.

        Args:
            adapter: Its name.
            names: The tensors'.
            dtype: Type of its parameters; by default as :func:`copy_dtype` says.
        """
        copies = {name: _copy(t, copy_dtype(t, dtype)) for name, t in own_tensors(self, names)}
        for name, copy in copies.items():
            added = parameter_name(copy_kind(name), adapter)
            if isinstance(copy, nn.Parameter):
                self.register_parameter(added, copy)
            else:
                self.register_buffer(added, copy)
        self.lora_note(adapter, copies)

    def lora_share_copy(self, adapter: str, name: str, copy: torch.Tensor) -> None:
        """Have a tensor read as the copy that ``adapter`` has of it on another module."""
        # not register_parameter: what is there already may be a copy that was torn off
        self._parameters[parameter_name(copy_kind(name), adapter)] = copy  # type: ignore[assignment]
        self.lora_note(adapter, (name,))
        self.lora_tied[adapter] = self.lora_tied.get(adapter, frozenset()) | {name}

    def lora_note(self, adapter: str, names: Iterable[str]) -> None:
        """Note that an adapter's copies of tensors are here."""
        added = {name: parameter_name(copy_kind(name), adapter) for name in names}
        # a new dict: a change that is undone has kept the old one
        self.lora_copies[adapter] = self.lora_copies.get(adapter, {}) | added
        self.lora_routing.names.add(adapter)

    def lora_draw(self, names: set[str]) -> None:
        """Make copies that were lost not a number: what is not loaded next is seen at once."""
        for name in names:
            tensor = stored(self, name)
            if tensor.is_floating_point():
                tensor.fill_(math.nan)

    def lora_remove(self, adapter: str) -> None:
        """Take the copies of ``adapter`` away."""
        for added in self.lora_copies.pop(adapter).values():
            delattr(self, added)
        self.lora_tied.pop(adapter, None)

    def lora_copy(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return name to copy, for one adapter."""
        return {name: stored(self, added) for name, added in self.lora_copies[adapter].items()}

    def lora_shares(self, name: str, weights: Weights | None = None) -> Weights:
        """Return the adapters whose copies of a tensor count, and how much of each.

        Of a fresh module there is no half: its shares add up to 1.

        Args:
            name: The tensor's, in the base.
            weights: The adapters, by default those that are in use and not merged.
        """
        live = self.lora_routing.now().live if weights is None else weights
        copies = self.lora_copies
        shares = tuple(pair for pair in live if pair[0] in copies and name in copies[pair[0]])
        if not self.lora_fresh:
            return shares
        total = math.fsum([factor for _, factor in shares])
        return tuple((adapter, factor / total) for adapter, factor in shares)

    def lora_read(
        self, name: str, weights: Weights | None = None
    ) -> list[tuple[torch.Tensor, float]]:
        """Return the copies of :meth:`lora_shares`, each with its share."""
        shares = self.lora_shares(name, weights)
        return [(stored(self, self.lora_copies[a][name]), factor) for a, factor in shares]

    def lora_trains(self) -> bool:
        """Say whether what is read now is the copies of adapters that train."""
        live = self.lora_routing.now().live
        return any(self._trains(name) for name, _ in live if name in self.lora_copies)

    def _trains(self, adapter: str) -> bool:
        copies = self.lora_copies[adapter].items()
        if not self.lora_copies[adapter].keys() >= {*self.lora_counts()}:
            return False  # a bias alone: the statistics stay the base's
        own = [stored(self, at) for name, at in copies if name not in self._buffers]
        # without a scale and a shift it moves as the rest of its adapter trains
        trains = [tensor.requires_grad for tensor in own]
        return any(trains) if trains else adapter not in self.lora_routing.frozen

    def lora_where(self, name: str) -> str:
        """Return under which name the tensor that ``name`` reads as now is kept."""
        shares = self.lora_shares(name)
        return self.lora_copies[shares[0][0]][name] if shares else name

    def lora_counts(self) -> list[str]:
        """Return the names of tensors that the module itself changes, and that cannot be mixed."""
        return [name for name in self.lora_names if name in self._buffers]

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep a buffer that the module's own code replaces where it is read, not in the base."""
        buffer = name in self.lora_names and name in self._buffers
        if buffer and isinstance(value, torch.Tensor) and not is_replica(self):
            name = self.lora_where(name)
        super().__setattr__(name, value)


def tensor_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the base's tensors that a module owns itself and a checkpoint holds."""
    hidden = added_names(module) | module._non_persistent_buffers_set
    stores = (module._parameters, module._buffers)
    return tuple(
        name
        for store in stores
        for name, t in store.items()
        if t is not None and name not in hidden
    )


def train_fault(module: nn.Module) -> str | None:
    """Return why a module's own tensors cannot be trained in full, or None."""
    split = split_of(module)
    if split is not None:
        return f"tensor parallelism has split it ({split.style!r}); give it a low-rank update"
    fault = split_fault(module) if tensor_names(module) else None
    if fault:
        return fault
    for name in tensor_names(module):
        tensor = parameter_of(module, name)
        if tensor is None:
            continue
        if is_lazy(tensor):
            return f"its {name} has no size yet"
        plain = type(tensor) is nn.Parameter or is_sharded(tensor)
        if not plain or tensor.dtype.itemsize < 2:
            return f"its {name} is a {type(tensor).__name__} of {tensor.dtype}, packed or quantized"
    return None


def parts_with_tensors(module: nn.Module, top: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and those below it that own tensors, each with its path, ``top`` being its."""
    for below, part in module.named_modules():
        if tensor_names(part):
            yield ".".join(filter(None, (top, below))), part


def own_tensors(module: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the module's own tensors of these names, never an adapter's copy."""
    for name in names:
        yield name, stored(module, name)


def mixture(original: torch.Tensor, copies: Sequence[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Return the original plus a share of each copy's difference from it, in the copies' type.

    Where the shares add up to 1 this is a mean of the copies, and the original is not looked at: of
    a fresh head it holds nothing that means anything.
    """
    first = copies[0][0]
    wide = torch.promote_types(first.dtype, torch.float32)
    left = 1.0 - math.fsum([factor for _, factor in copies])
    terms = [copy.to(wide) * factor for copy, factor in copies]
    if not math.isclose(left, 0.0, abs_tol=1e-6):
        terms.append(original.to(first.device, wide) * left)
    return sum(terms[1:], terms[0]).to(first.dtype)


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name and value of the base's parameters that a module owns itself."""
    for name in tensor_names(module):
        tensor = parameter_of(module, name)
        if tensor is not None:
            yield name, tensor


def copy_dtype(tensor: torch.Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """Return the type of a copy: that of an adapter's factors, and of what is no parameter its own.

    Args:
        tensor: The base's.
        wanted: What the configuration says; None: float32 in the place of 16 bits, where small
            updates round away and no GradScaler can work.
    """
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor.dtype
    return wanted or (torch.float32 if tensor.dtype in SIXTEEN_BIT else tensor.dtype)


def _copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    data = full_tensor(tensor).detach().to(dtype, copy=True)
    if not isinstance(tensor, nn.Parameter):
        return data
    copy = nn.Parameter(data, requires_grad=data.is_floating_point() or data.is_complex())
    mark_filled(copy)
    return copy


def stored(module: nn.Module, name: str) -> torch.Tensor:
    """Return a tensor that stands on a module, never what the name may read as.

    The replicas of ``nn.DataParallel`` keep theirs as plain attributes.
    """
    tensor = parameter_of(module, name)
    if tensor is None:
        tensor = module._buffers.get(name)
    return module.__dict__[name] if tensor is None else tensor


def _reader(name: str) -> Any:
    def read(self: TrainedModule) -> torch.Tensor:
        own = parameter_of(self, name)
        if is_sharded(own):  # FSDP2 asks for its part; in a forward, whole tensors stand there
            return own  # type: ignore[return-value]
        copies = [(to_local(copy), factor) for copy, factor in self.lora_read(name)]
        if not copies:
            return to_local(stored(self, name))
        original = to_local(stored(self, name))
        one = len(copies) == 1 and copies[0][1] == 1.0
        tensor = copies[0][0] if one else mixture(original, copies)
        # a module computes in the type that it has; casting its input would cost far more
        tensor = tensor.to(original.dtype)
        # bitsandbytes writes another type into the bias that it reads
        return tensor.view_as(tensor) if name == OWN_BIAS and _is_packed(self) else tensor

    return read


def _is_packed(module: nn.Module) -> bool:
    weight = parameter_of(module, "weight")
    return weight is not None and not has_float_weight(module)


def _writer(name: str) -> Any:
    def write(self: TrainedModule, value: torch.Tensor) -> None:
        # only the replicas of nn.DataParallel keep tensors as plain attributes
        self.__dict__[name] = value

    return write


TrainedModule.lora_mixin = TrainedModule
