"""Patching a model in place, and giving it back as it was."""

import torch
from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.devices import execution_device, is_offloaded, is_on_meta
from hf_lora.errors import StateError, TargetError, listing
from hf_lora.layers.base import LoRALayer, Slot, patched_class, restore_class, swap_class
from hf_lora.layers.hosts import adapter_dtype, gradient_fault, has_float_weight
from hf_lora.layers.names import check_adapter_name
from hf_lora.layers.quantized import keep_gradients, restore_packing
from hf_lora.layers.table import layer_class
from hf_lora.layers.trained import TrainedModule, tensor_names
from hf_lora.model.plan import Plan
from hf_lora.model.planning import make_plan
from hf_lora.model.registry import Adapter, Registry, create, discard, find, wrapped


def patch(model: nn.Module, config: LoRAConfig, name: str) -> Registry:
    """Wrap an unwrapped model: freeze the base and attach one adapter as ``config`` says.

    Raises:
        TargetError: The plan has problems; the model is as it was.
        StateError: Wrapped already, or without weights.
    """
    check_adapter_name(name)
    if find(model) is not None:
        raise StateError(
            f"This {type(model).__name__} is wrapped already; use hf_lora.add_adapter(model, name) "
            "for another adapter, or hf_lora.unwrap(model) to begin anew."
        )
    plan = make_plan(model, config)
    check_plan(model, plan)
    registry = create(model)
    registry.repacked = keep_gradients(model)
    try:
        check_gradients(model, [target.path for target in plan.targets])
        attach_plan(model, registry, plan, name)
    except BaseException:
        unpatch(model)
        raise
    registry.routing.active = (name,)
    return registry


def unpatch(model: nn.Module) -> nn.Module:
    """Give back the model that was wrapped: classes, Parameters, flags and keys as they were."""
    model, registry = wrapped(model)
    registry.put_weights_back(model)
    for name in list(registry.adapters):
        detach(registry, name)
    restore_packing(registry.repacked)
    discard(model)
    return model


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise one error for everything that forbids executing ``plan`` on ``model``."""
    if plan.problems:
        raise TargetError(
            listing(
                f"This {plan.model} cannot be wrapped so",
                plan.problems,
                "See print(hf_lora.plan(model, ...)) and model.named_modules().",
            )
        )
    check_present(
        model, [*(target.path for target in plan.targets), *(item.path for item in plan.trained)]
    )


def check_present(model: nn.Module, paths: list[str]) -> None:
    """Raise StateError if the modules at ``paths`` have no data that could be adapted."""
    meta = [path for path in paths if is_on_meta(model.get_submodule(path))]
    if meta:
        raise StateError(
            f"{len(meta)} targeted layers are on the meta device (first: {meta[0]}); load the "
            "weights first, for instance with from_pretrained, then wrap."
        )
    offloaded = [path for path in paths if is_offloaded(model.get_submodule(path))]
    if offloaded:
        raise StateError(
            f"{len(offloaded)} targeted layers are offloaded by accelerate (first: "
            f"{offloaded[0]}), which hf_lora does not adapt yet; choose a device_map that "
            "keeps them in memory, or exclude them."
        )


def check_gradients(model: nn.Module, paths: list[str]) -> None:
    """Raise TargetError if a layer's backward gives its input no gradient.

    Layers with an ordinary weight are known to; of the others one of each kind is tried.
    """
    faults: dict[tuple, str | None] = {}
    problems = []
    for path in paths:
        module = model.get_submodule(path)
        host = module.lora_host if isinstance(module, LoRALayer) else type(module)
        if has_float_weight(module) and host.__module__.startswith(("torch.nn.", "transformers.")):
            continue
        kind = (host, type(module._parameters.get("weight")))
        if kind not in faults:
            faults[kind] = gradient_fault(module)
        if faults[kind]:
            problems.append(f"{path} ({host.__name__}): {faults[kind]}")
    if problems:
        raise TargetError(listing("These layers cannot be trained through", problems))


def attach_plan(model: nn.Module, registry: Registry, plan: Plan, name: str) -> Adapter:
    """Execute a checked plan: new factors, started as the configuration says."""
    slots = {target.path: target.slot for target in plan.targets}
    dtypes = {target.path: target.dtype for target in plan.targets}
    trained = [item.path for item in plan.trained]
    return attach(model, registry, name, plan.config, slots, trained, dtypes, plan.config.init)


def attach(
    model: nn.Module,
    registry: Registry,
    name: str,
    config: LoRAConfig,
    slots: dict[str, Slot],
    trained: list[str],
    dtypes: dict[str, torch.dtype] | None = None,
    init: str | None = None,
) -> Adapter:
    """Give the modules at these paths the tensors of a new adapter.

    Args:
        model: The wrapped model.
        registry: Its registry.
        name: The new adapter's name.
        config: What the adapter is; kept with it and saved with it.
        slots: Path of each layer to adapt, to its numbers.
        trained: Paths of the modules to train in full.
        dtypes: Type of the factors for each path; by default chosen from the layer.
        init: How the factors start; None leaves them unfilled, for a load to fill.
    """
    conflicts = _conflicts(model, registry, slots, trained)
    if conflicts:
        raise TargetError(listing(f"The adapter {name!r} cannot be added", conflicts))
    adapter = Adapter(name=name, config=config, slots={}, trained=tuple(trained))
    registry.adapters[name] = adapter
    try:
        for path, slot in slots.items():
            module = model.get_submodule(path)
            dtype = dtypes[path] if dtypes else adapter_dtype(module)
            layer = _as_layer(module, registry, path)
            layer.lora_add(name, slot, dtype=dtype, device=execution_device(layer), init=init)
            adapter.slots[path] = slot
        for top in trained:
            for path, module in _with_tensors(model, top):
                _as_trained(module, registry, path).lora_add_copy(name)
    except BaseException:
        detach(registry, name)
        raise
    return adapter


def detach(registry: Registry, name: str) -> None:
    """Take an adapter's tensors away, and the patch off every module that carries no other."""
    adapter = registry.adapters.pop(name)
    for path in adapter.slots:
        registry.layers[path].lora_remove(name)
    for path, layer in list(registry.layers.items()):
        if not layer.lora_slots:
            restore_class(registry.layers.pop(path))
    for path, module in list(registry.copies.items()):
        if name in module.lora_copies:
            module.lora_remove_copy(name)
        if not module.lora_copies:
            restore_class(registry.copies.pop(path))
    registry.routing.active = tuple(n for n in registry.routing.active if n != name)


def _as_layer(module: nn.Module, registry: Registry, path: str) -> LoRALayer:
    if not isinstance(module, LoRALayer):
        swap_class(module, layer_class(type(module)), registry.routing)
        module.__dict__["lora_slots"] = {}
    assert isinstance(module, LoRALayer)
    registry.layers[path] = module
    return module


def _as_trained(module: nn.Module, registry: Registry, path: str) -> TrainedModule:
    if not isinstance(module, TrainedModule):
        names = tensor_names(module)
        swap_class(module, patched_class(TrainedModule, type(module), names), registry.routing)
        module.__dict__["lora_copies"] = {}
    assert isinstance(module, TrainedModule)
    registry.copies[path] = module
    return module


def _with_tensors(model: nn.Module, top: str) -> list[tuple[str, nn.Module]]:
    found = []
    for below, module in model.get_submodule(top).named_modules():
        if tensor_names(module):
            found.append((f"{top}.{below}" if below else top, module))
    return found


def _conflicts(
    model: nn.Module, registry: Registry, slots: dict[str, Slot], trained: list[str]
) -> list[str]:
    problems = [
        f"{path} is trained in full by another adapter" for path in slots if path in registry.copies
    ]
    for top in trained:
        for path, module in _with_tensors(model, top):
            if path in registry.layers:
                problems.append(f"{path} has a low-rank update from another adapter")
            elif "forward" in module.__dict__:
                problems.append(f"{path} has a forward of its own, put there by another library")
    return problems
