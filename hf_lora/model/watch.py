"""What others do to a wrapped model, seen at its next forward.

Converters and quantizers put new layers in the place of adapted ones, projections are fused into
one that stands beside them, and fused losses read the output head's weight past its forward. Either
the adapters are in force afterwards, or it is said here.

A forward pays for comparing the places of adapted layers, in one pass without Python in it; all
else is looked at when something has changed, or is done in a way that is new.
"""

import contextlib
import functools
import operator
import warnings
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from hf_lora.compat.torch_modules import is_replica, remove_pre_hooks, remove_state_hooks
from hf_lora.errors import HfLoRAWarning, StateError, listing
from hf_lora.kinds.table import kind_of
from hf_lora.layers.kind import Patched
from hf_lora.layers.names import REGISTRY
from hf_lora.layers.statistics import FrozenNorm
from hf_lora.layers.trained import TrainedModule
from hf_lora.planning.heads import output_head

if TYPE_CHECKING:
    from hf_lora.model.registry import Registry

_HEAD = (
    "{names} had no part in what was computed just now, although an adapter on it is in use: its "
    "weight may have been read past the layer, as fused losses do (TRL's, Liger's). The result is "
    "that of the base's head. Turn the fused loss off, train the head in full with train=[...], or "
    "merge the adapter with hf_lora.merge(model) where it does not train"
)


class Places:
    """Where the modules that carry adapters stand in a model, and what stands around them."""

    def __init__(self, model: nn.Module, registry: "Registry", before: "Places | None" = None):
        carriers = set(registry.modules.values())
        modules = dict(model.named_modules())
        # without the model itself, which this would keep alive, and which stands nowhere
        self.paths = {path: each for path, each in modules.items() if path and each in carriers}
        parents = {path.rpartition(".")[0] for path in self.paths}
        slots = {*self.paths}
        for path in parents:
            while path:
                slots.add(path)
                path = path.rpartition(".")[0]
        split = [path.rpartition(".") for path in slots]
        self.stores = [modules[parent]._modules for parent, _, _ in split]
        self.names = [name for _, _, name in split]
        self.modules = [modules[path] for path in slots]
        self.parents = {path: modules[path]._modules for path in parents}
        known = before.children if before is not None else {}
        self.children = {p: known.get(p, list(store)) for p, store in self.parents.items()}
        """What stood in each when it was first seen."""

        self.stale = False
        """Whether some of them carry adapters no longer."""

        self.fields = [vars(module) for module in self.paths.values()]
        self.count = sum(map(len, self.parents.values()))
        self.forwards = self._forwards(model)
        head = output_head(model) if self.paths else set()
        self.heads = {path: module for path, module in self.paths.items() if path in head}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as nothing: a copy's places are found anew."""
        return _nothing, ()

    def _forwards(self, model: nn.Module) -> int:
        own = "forward" in vars(model)
        return own + sum(map(operator.contains, self.fields, repeat("forward")))

    def intact(self, model: nn.Module) -> bool:
        """Say whether all stand where they stood, with nothing new beside or in front of them."""
        return (
            not self.stale
            and all(map(operator.is_, map(dict.get, self.stores, self.names), self.modules))
            and sum(map(len, self.parents.values())) == self.count
            and self._forwards(model) == self.forwards
        )

    def beside(self) -> dict[str, tuple[str, nn.Module]]:
        """Return what was put beside an adapted layer and is a linear layer, by that one's path."""
        found = {}
        for path, layer in self.paths.items():
            parent = path.rpartition(".")[0]
            store, before = self.parents.get(parent, {}), self.children.get(parent, [])
            for name, module in store.items():
                if name not in before and module is not None and kind_of(module) is not None:
                    found.setdefault(path, (name, layer))
        return found


def _nothing() -> None:
    return None


def watch(model: nn.Module) -> None:
    """Look after the model at each of its forwards, and when a layer of it is replaced."""
    model.register_forward_pre_hook(_look, with_kwargs=True)
    model.register_load_state_dict_pre_hook(_make_room)
    model.register_load_state_dict_post_hook(_note_again)
    model.register_state_dict_pre_hook(_settle)
    _refuse_replacing()


@functools.cache
def _refuse_replacing() -> None:
    """Have PyTorch ask, once for the process, before a module takes the place of another."""
    register_module_module_registration_hook(_replace)


def _replace(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Raise StateError before a layer with an adapter is converted to one that has none.

    A layer that shares nothing with the old one is somebody's decision, and told at the next
    forward; one around the old one changes nothing.
    """
    old = parent._modules.get(name)
    if old is new or new is None or not isinstance(old, Patched):
        return
    own = {id(parameter) for parameter in old.parameters(recurse=False)}
    converted = any(id(parameter) in own for parameter in new.parameters())
    if converted and all(module is not old for module in new.modules()):
        if isinstance(old, FrozenNorm):
            raise StateError(
                f"{name} of this {type(parent).__name__} is a normalization of a frozen base, and "
                f"hf_lora keeps its statistics still; a {type(new).__name__} that was to take its "
                "place would move them. Convert before wrapping."
            )
        raise StateError(
            f"{name} of this {type(parent).__name__} carries an adapter, which would be gone with "
            f"it: a {type(new).__name__} with its weight was to take its place. Convert or "
            "quantize before wrapping; hf_lora.save(model, folder), hf_lora.unwrap(model) and, "
            "afterwards, hf_lora.load(model, folder) take an adapter over."
        )


def unwatch(model: nn.Module) -> None:
    """Take :func:`watch` off the model."""
    remove_pre_hooks(model, lambda hook: hook is _look)
    remove_state_hooks(model, lambda hook: hook in (_make_room, _settle, _note_again))


def _settle(model: nn.Module, *_: Any) -> None:
    vars(model)[REGISTRY].settle_buffers()  # or what has moved would stand under the base's name


def _make_room(model: nn.Module, *args: Any) -> None:
    vars(model)[REGISTRY].buffers.make_room(model, vars(model)[REGISTRY], *args)


def _note_again(model: nn.Module, _: Any) -> None:
    vars(model)[REGISTRY].buffers.note_again(model, vars(model)[REGISTRY])


def look_at_places(model: nn.Module, registry: "Registry") -> dict[str, tuple[str, nn.Module]]:
    """Check that all that carries adapters is in its place, after any change of the module tree.

    Returns:
        Adapted layers beside which a linear layer was put since: path to its name and the layer.

    Raises:
        StateError: Something is in force no longer; each module is named.
    """
    places = registry.places
    if places is not None and places.intact(model):
        return {}
    registry.check_in_place(model)
    registry.places = Places(model, registry, places)
    return places.beside() if places is not None else {}


def _look(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or is_replica(model):
        return
    registry = vars(model)[REGISTRY]
    if model.training and torch.is_grad_enabled():
        registry.buffers.begin(model, registry)
    before = registry.places
    fused = look_at_places(model, registry)
    heads = _asked_for(registry, ("forward", id(_forward(model)), model.training, *kwargs))
    if fused or heads:
        _listen(model, registry, fused, heads, before)


def _forward(model: nn.Module) -> Any:
    return vars(model).get("forward", type(model).forward)


def _asked_for(registry: "Registry", way: tuple[Any, ...]) -> dict[str, nn.Module]:
    """Return the adapted heads that must be heard in a computation that was not done yet so."""
    if registry.places is None or not registry.places.heads:
        return {}
    routing = registry.routing
    key = (way, torch.is_grad_enabled(), routing.active, routing.merged)
    if key in registry.heard:
        return {}
    registry.heard.add(key)
    used = {name for name in routing.active if name not in routing.merged}
    return {
        path: head
        for path, head in registry.places.heads.items()
        if isinstance(head, Patched)
        and not isinstance(head, TrainedModule)
        and (names := used & set(head.lora_adapters()))
        and not (registry.gradients_checked and _trains(head, names))
    }


def _trains(head: Patched, names: Iterable[str]) -> bool:
    """Say whether gradients would show that the head is not heard."""
    held = (tensor for name in names for tensor in head.lora_tensors(name).values())
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in held)


def _listen(
    model: nn.Module,
    registry: "Registry",
    fused: dict[str, tuple[str, nn.Module]],
    heads: dict[str, nn.Module],
    before: Places | None,
) -> None:
    """Find out in the forward that is about to begin which of these layers are called."""
    layers = {*heads.values(), *(layer for _, layer in fused.values())}
    called, hooks = _called(layers, torch.is_grad_enabled())

    def end(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for hook in (*hooks, last):
            hook.remove()
        if output is None:  # it failed
            return
        silent = [f"{p} (beside it: {n})" for p, (n, layer) in fused.items() if layer not in called]
        if silent:
            registry.places = before  # the next forward looks again
            raise StateError(
                listing(
                    "These adapted layers are not called any more since a layer was put beside "
                    "them, into which they may be fused",
                    silent,
                    "Undo that; or merge the adapter first (hf_lora.merge), and fuse then.",
                )
            )
        _tell(registry, [path for path, head in heads.items() if head not in called])

    last = model.register_forward_hook(end, always_call=True)


def _called(layers: Iterable[nn.Module], trains: bool) -> tuple[set[nn.Module], list[Any]]:
    called: set[nn.Module] = set()

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() or not trains:  # what a step generates is not its loss
            called.add(layer)

    return called, [layer.register_forward_pre_hook(note) for layer in layers]


@contextlib.contextmanager
def heads_heard(
    model: nn.Module, registry: "Registry", way: str, *, trains: bool
) -> Iterator[None]:
    """Tell if an adapted output head has no part in what is computed inside the ``with`` block.

    Args:
        model: A wrapped model.
        registry: Its registry.
        way: What is computed; asked once for each choice of adapters.
        trains: Whether a loss is, of which what runs without gradients is no part.
    """
    look_at_places(model, registry)
    heads = _asked_for(registry, (way, model.training))
    called, hooks = _called(heads.values(), trains)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    _tell(registry, [path for path, head in heads.items() if head not in called])


def _tell(registry: "Registry", paths: list[str]) -> None:
    told = (*paths, *registry.routing.active)
    if not paths or told in registry.heard:
        return
    registry.heard.add(told)
    warnings.warn(_HEAD.format(names=", ".join(paths)), HfLoRAWarning, stacklevel=4)
