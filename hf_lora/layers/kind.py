"""What every patched module is: an instance of a class of ours, made of its own class.

A module is patched in place by changing its class to a subclass of the one that it has
(``class LoRALinear(LoRALayer, nn.Linear)``), so that its parameters, keys and identity stay.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Hashable, Mapping, Set
from typing import Any

import torch
from torch import nn

from hf_lora.compat.transformers import COMPUTES_LOCALLY, mark_filled
from hf_lora.functional.low_rank import Product
from hf_lora.layers.casting import sparing
from hf_lora.layers.choice import Weights
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.meta import keep_values, refill
from hf_lora.layers.names import HELD, LORA_BIAS
from hf_lora.layers.replaced import Replaced, Tensors
from hf_lora.layers.roles import OWN_BIAS, Layout, Role, Shapes
from hf_lora.layers.routing import Routing

OWN_FIELDS = frozenset(
    {
        "lora_routing", "lora_slots", "lora_copies", "lora_tied", "lora_fresh", "lora_token_rows",
        COMPUTES_LOCALLY,
    }
)  # fmt: skip
"""What we keep in a patched module's ``__dict__``; all else there is the host's, by any name."""


class Patched(nn.Module):
    """A module whose class was swapped for a subclass of its own, and can be swapped back."""

    lora_host: type[nn.Module]
    """The class that the module had."""

    lora_mixin: type["Patched"]
    """The class of ours that was put in front of it."""

    lora_prefix = "LoRA"
    """What the names of such classes begin with."""

    lora_names: tuple[str, ...] = ()
    """The tensors that the class has properties for (trained copies only)."""

    lora_input = "input"
    """What the first argument of the host's forward is called, for calls by keyword."""

    lora_layout: Layout
    """How files hold its tensors; of modules trained in full, as a checkpoint does."""

    lora_weights: tuple[str, ...] = ("weight",)
    """The host's tensors that updates are of, where these are not adapted apart."""

    lora_adds_up = True
    """Whether several adapters on one module are added up, each with a factor of its own."""

    lora_fresh = False
    """Whether the base's own tensors hold nothing that means anything, as of a fresh head."""

    fan_in_fan_out = False
    """Whether the host keeps its weight as (in, out)."""

    lora_routing: Routing

    lora_slots: dict[str, LayerConfig]
    """Adapter name to its numbers, for the adapters that the module has."""

    def lora_roles(self, adapter: str) -> tuple[Role, ...]:
        """Return what an adapter has on this module, in the order in which it is computed with."""
        raise NotImplementedError

    def lora_adapters(self) -> Collection[str]:
        """Return the adapters that have something on this module."""
        return self.lora_slots.keys()

    def lora_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return role to tensor: what this process has of it."""
        raise NotImplementedError

    def lora_added(self) -> set[str]:
        """Return the names of the parameters and buffers that hf_lora added to this module."""
        return {role.held for name in self.lora_adapters() for role in self.lora_roles(name)}

    def lora_hold(self, name: str, parameter: nn.Parameter) -> None:
        """Have a new parameter of an adapter stand on this module."""
        mark_filled(parameter)
        self.register_parameter(name, parameter)
        # accelerate's init_empty_weights has put another there, without values
        self._parameters[name] = parameter

    def lora_remove(self, adapter: str) -> None:
        """Take away what an adapter has here."""
        raise NotImplementedError

    def lora_misfit(self) -> str | None:
        """Return how the host has changed since, so that its adapters do not fit, or None."""
        return None

    def lora_is_at_start(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Say whether an adapter leaves the host's output as it is, as it does before training.

        Args:
            adapter: Its name.
            tensors: What it has here, all of it in this process.
        """
        raise NotImplementedError

    def lora_how(self, grouped: Set[nn.Module]) -> str | None:
        """Return how the module computes in training, if that is worth telling.

        Args:
            grouped: The modules that are computed together with others.
        """
        return None

    def lora_clash(self, shares: Mapping[str, float], merged: Collection[str]) -> str | None:
        """Return why adapters cannot be in use together here, "" where that goes without saying.

        None if they can.

        Args:
            shares: Those in use that the module has, each with its factor.
            merged: The adapters inside the weights, now or soon.
        """
        return None

    def lora_split(self, adapter: str, mesh: Any) -> list[nn.Parameter]:
        """Make an adapter's whole tensors DTensors on a mesh, as tensor parallelism has the host.

        Returns:
            Those of which each process will have a part of the gradient's sum.
        """
        raise NotImplementedError

    def lora_merge_fault(self) -> str | None:
        """Return why adapters cannot be put into the host's own tensors, or None."""
        raise NotImplementedError

    def lora_merged(self, adapters: Weights, replaced: Replaced | None) -> Tensors:
        """Return the host's own tensors with adapters in them: name to tensor, rounded once.

        Args:
            adapters: All that shall be inside, with their factors.
            replaced: What stood in the module before, if some adapters are inside already.
        """
        raise NotImplementedError

    def lora_products_to_come(
        self, adapters: Weights, replaced: Replaced | None
    ) -> dict[str, list[Product]] | None:
        """Return what a merge adds to tensors, if it can be added later, without this class.

        Args:
            adapters, replaced: As for :meth:`lora_merged`.

        Returns:
            Name of a tensor to its updates; None if the merged tensors must be made here and now.
        """
        return None

    def lora_merged_beside(self, adapters: Weights, replaced: Replaced | None) -> Tensors:
        """Return the merged tensors that are none of :meth:`lora_products_to_come`."""
        return {}

    def lora_made_of(self, name: str, adapters: Weights) -> Hashable:
        """Return what a tensor of :meth:`lora_merged` is made of, if that may be another's as well.

        Where two modules give the same, the one merged tensor is for both.

        Args:
            name: The tensor's.
            adapters: As for :meth:`lora_merged`.
        """
        return None

    def lora_merge_damage(self, merged: Tensors) -> str | None:
        """Return what is wrong with merged tensors that was not with the host's own, or None."""
        return None

    def lora_draw(self, names: set[str]) -> None:
        """Give added tensors that have new memory and no values some, so that none is garbage."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Move or cast, but let no tensor of ours lose precision or come out as garbage."""
        kept = keep_values(self, fn)
        result = super()._apply(sparing(self, fn), *args, **kwargs)
        refill(self, kept)
        return result

    def _replicate_for_data_parallel(self) -> Any:
        """Have the replicas, which run in threads of their own, use what is used in this one."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__["lora_routing"] = self.lora_routing.seen_here()
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by mixin and host: classes made at run time have no importable name."""
        return _rebuild, (self.lora_mixin, self.lora_host, self.lora_names), self.__getstate__()

    @classmethod
    def lora_fields(cls, host: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
        """Return what a subclass has beside the mixin's own, for tensors called ``names``."""
        return {}


class Adaptable(Patched):
    """A kind of layer that targets can mean: what it asks of a host, before that is patched.

    A new kind is a class below this one and a row in :mod:`hf_lora.kinds.table`.
    """

    lora_layout: Layout
    """How files hold its tensors."""

    @classmethod
    def lora_takes(cls, host: nn.Module) -> bool:
        """Say whether a module declares itself to be of this kind."""
        raise NotImplementedError

    @classmethod
    def lora_widths(cls, host: nn.Module) -> tuple[int, int] | None:
        """Return how many numbers a module reads and gives for each row, if that is what it does.

        Asked of classes that are registered; of others the module's own attributes are.
        """
        return None

    @classmethod
    def lora_fault(cls, host: nn.Module) -> str | None:
        """Return why a module of this kind cannot be adapted after all, or None."""
        return None

    @classmethod
    def lora_parts(cls, host: nn.Module) -> tuple[str, ...]:
        """Return the parameters of a module that are adapted apart; none where there is but one."""
        return ()

    @classmethod
    def lora_rank_fault(cls, host: nn.Module, r: int) -> str | None:
        """Return what is wrong with a rank on this module, or None."""
        return None

    @classmethod
    def lora_gradient_fault(cls, host: nn.Module, *, certain: bool = False) -> str | None:
        """Return why no gradient would reach what the module computes from, or None.

        Args:
            host: The module, patched or not.
            certain: Whether only what is sure is a fault.
        """
        return None

    @classmethod
    def lora_probe_key(cls, host: nn.Module) -> tuple | None:
        """Return what modules have in common that need one trial; None if this one needs none."""
        return None

    @classmethod
    def lora_shapes(cls, host: nn.Module, config: LayerConfig) -> dict[str, tuple[int, ...]]:
        """Return role to shape of what an adapter of these numbers would have on a module."""
        raise NotImplementedError

    @classmethod
    def lora_bias_shapes(cls, host: nn.Module, config: LayerConfig) -> dict[str, tuple[int, ...]]:
        """Return the same of the biases that it would have, where layers of this kind have some."""
        return {}

    @classmethod
    def lora_bias_fault(cls, host: nn.Module, config: LayerConfig) -> str | None:
        """Return why a module cannot have the biases that are asked for, or None."""
        return "there is no bias on B for layers of its kind" if config.lora_bias else None

    @classmethod
    def lora_bias_fit_fault(cls, host: nn.Module, shapes: Shapes) -> str | None:
        """Return why biases in a file are for another kind of layer, or None."""
        return "layers of its kind have no biases" if {LORA_BIAS, OWN_BIAS} & {*shapes} else None

    @classmethod
    def lora_fit_fault(cls, host: nn.Module, shapes: Shapes) -> str | None:
        """Return why tensors of these shapes, which are sound, are for another module, or None."""
        raise NotImplementedError

    @classmethod
    def lora_product_fault(cls, host: nn.Module) -> str | None:
        """Return why an update is no product that is added to a tensor of the host, or None."""
        return f"an update of the kind {cls.__name__} is no product of two factors"

    @classmethod
    def lora_products(
        cls, host: nn.Module, config: LayerConfig, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Product]:
        """Return an adapter's updates of the host's tensors in factors: name to product.

        Args:
            host: The module, patched or not; its tensors are not looked at.
            config: The adapter's numbers on it.
            tensors: Role to tensor.
        """
        raise NotImplementedError

    def lora_add(
        self,
        adapter: str,
        config: LayerConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        init: str | None,
    ) -> None:
        """Give the layer the tensors of an adapter; ``init=None`` leaves them unfilled."""
        raise NotImplementedError


@functools.cache
def patched_class(
    mixin: type[Patched], host: type[nn.Module], names: tuple[str, ...] = ()
) -> type[Patched]:
    """Return the one class that puts ``mixin`` in front of ``host``."""
    if vars(mixin).get("lora_host") is host:
        return mixin
    fields = {
        "__module__": __name__,
        "__doc__": mixin.__doc__,
        "lora_host": host,
        "lora_mixin": mixin,
        "lora_names": names,
        "lora_input": _first_argument(host),
    }
    fields |= mixin.lora_fields(host, names)
    return type(f"{mixin.lora_prefix}{host.__name__}", (mixin, host), fields)


def _rebuild(mixin: type[Patched], host: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    return object.__new__(patched_class(mixin, host, names))


def added_names(module: nn.Module) -> set[str]:
    """Return the names of the parameters and buffers that hf_lora added to ``module``."""
    held = vars(module).get(HELD, {}).values()
    copies = {added for names in held for added in names.values()}
    return copies | module.lora_added() if isinstance(module, Patched) else copies


def parameter_of(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter that a module itself holds under ``name``, past any property."""
    # not by get: TorchScript's store has none
    return next((tensor for held, tensor in module._parameters.items() if held == name), None)


def _first_argument(host: type[nn.Module]) -> str:
    try:
        names = list(inspect.signature(host.forward).parameters)
    except (TypeError, ValueError):  # written in C
        names = []
    return names[1] if len(names) > 1 else Patched.lora_input
