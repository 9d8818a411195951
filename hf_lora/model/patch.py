"""Patching a model in place, and giving it back as it was."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from hf_lora.compat.accelerate import execution_device, present
from hf_lora.compat.bitsandbytes import keep_gradients, restore_packing
from hf_lora.compat.dtensor import has_distributed_parameters
from hf_lora.config import LoRAConfig
from hf_lora.errors import TargetError, listing
from hf_lora.kinds.table import kind_of, layer_class
from hf_lora.kinds.token_rows import TrainedRows, rows_class
from hf_lora.layers.biases import bias_kinds
from hf_lora.layers.hosts import adapter_dtype, chosen_dtype, taken_names
from hf_lora.layers.instance_forward import has_foreign_forward
from hf_lora.layers.kind import Adaptable, Patched, parameter_of, patched_class
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import check_adapter_name, copy_kind
from hf_lora.layers.patched import restore_class, swap_class
from hf_lora.layers.reading import Read, read_of
from hf_lora.layers.roles import OWN_BIAS, Ties
from hf_lora.layers.statistics import FrozenNorm, has_statistics
from hf_lora.layers.token_rows import INDEX, ROWS, TokenRows
from hf_lora.layers.trained import TrainedModule, copy_dtype, parts_with_tensors, tensor_names
from hf_lora.layers.uncalled import unheard
from hf_lora.model.adapter import Adapter
from hf_lora.model.checks import check_gradients, check_no_engine, check_plan, warn_of_plan
from hf_lora.model.registry import (
    Registry,
    check_fresh,
    create,
    pop_registry,
    wrapped,
)
from hf_lora.model.replicas import spread
from hf_lora.model.watch import Places
from hf_lora.planning.make import make_plan
from hf_lora.planning.records import Plan
from hf_lora.planning.token_rows import Rows, row_conflicts


def patch(model: nn.Module, config: LoRAConfig, name: str) -> Registry:
    """Wrap an unwrapped model: freeze the base and attach one adapter as ``config`` says.

    Raises:
        TargetError: The plan has problems; the model is as it was.
        StateError: Wrapped already, or without weights.
    """
    check_adapter_name(name)
    check_fresh(model)
    plan = make_plan(model, config)
    check_plan(model, plan)
    registry = create(model)
    registry.repacked = keep_gradients(model)
    try:
        untrainable = check_gradients(model, plan)
        attach_plan(model, registry, plan, name)
        registry.routing.choose(((name, 1.0),))
        warn_of_plan(plan, untrainable, stacklevel=3)
    except BaseException:
        unpatch(model)
        raise
    return registry


def unpatch(model: nn.Module) -> nn.Module:
    """Give back the model that was wrapped: classes, Parameters, flags and keys as they were."""
    model, registry = wrapped(model)
    registry.check_classes(*registry.adapters)
    registry.put_weights_back(model)
    for name in list(registry.adapters):
        remove_adapter(registry, name)
    restore_packing(registry.repacked)
    for norm in registry.norms.values():
        restore_class(norm)
    _restore_base(model)
    return model


def _restore_base(model: nn.Module) -> None:
    """Take the registry off the model and give the base its flags back."""
    registry = pop_registry(model)
    registry.given_back = [
        (parameter, parameter.requires_grad)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if registry.base_flags.get(name, parameter.requires_grad) != parameter.requires_grad
    ]
    for parameter, flag in registry.given_back:
        parameter.requires_grad = not flag


def attach_plan(model: nn.Module, registry: Registry, plan: Plan, name: str) -> Adapter:
    """Execute a checked plan: new factors, started as the configuration says.

    Raises:
        StateError: An optimizer of DeepSpeed's would never train them.
    """
    check_no_engine(model)
    slots = {target.path: target.slot for target in plan.targets}
    dtypes = {target.path: target.dtype for target in plan.targets}
    trained = [item.path for item in plan.trained]
    adapter = attach(
        model,
        registry,
        name,
        plan.config,
        slots,
        trained,
        dtypes=dtypes,
        init=plan.config.init,
        ties=plan.ties,
        biases=[item.path for item in plan.biases],
        rows=plan.all_rows,
    )
    registry.buffers.note(model, registry)
    return adapter


def attach(
    model: nn.Module,
    registry: Registry,
    name: str,
    config: LoRAConfig,
    slots: dict[str, LayerConfig],
    trained: list[str],
    dtypes: dict[str, torch.dtype] | None = None,
    init: str | None = None,
    ties: Ties = MappingProxyType({}),
    biases: Iterable[str] = (),
    rows: Rows = MappingProxyType({}),
) -> Adapter:
    """Give the modules at these paths the tensors of a new adapter.

    Args:
        model, registry: The wrapped model, and its registry.
        name: The new adapter's name.
        config: What the adapter is; kept with it and saved with it.
        slots: Path of each layer to adapt, to its numbers.
        trained: Paths of the modules to train in full.
        dtypes: Type of the factors for each path; by default chosen from the layer.
        init: How the factors start; None leaves them unfilled, for a load to fill.
        ties: What shall be read as the copy of another of these tensors.
        biases: Paths of other modules of which the bias alone is trained.
        rows: Path of each module of which some rows are to train, to these.
    """
    modules = dict(model.named_modules())
    copied = _copied(modules, trained, ties)
    for path in biases:
        copied.setdefault(path, (modules[path], {}))[1][OWN_BIAS] = None
    conflicts = _conflicts(modules, registry, name, slots, copied)
    conflicts += row_faults(modules, registry, name, rows)
    conflicts += [f"{path} has rows and trained tensors" for path in copied.keys() & rows.keys()]
    if conflicts:
        raise TargetError(listing(f"The adapter {name!r} cannot be added", conflicts))
    adapter = Adapter(name, config, {}, tuple(trained), ties, tuple(biases), rows)
    registry.adapters[name] = adapter
    try:
        # what is made in inference mode could never be trained
        with torch.inference_mode(False):
            for path, slot in slots.items():
                layer = _as_layer(modules[path], registry, path, read_of(path, modules))
                dtype = dtypes[path] if dtypes else adapter_dtype(layer)
                device = execution_device(layer)
                with present(layer) if slot.bias else contextlib.nullcontext():
                    layer.lora_add(name, slot, dtype=dtype, device=device, init=init)
                adapter.slots[path] = slot
                adapter.places[path] = None
            for path, (module, names) in copied.items():
                train_module(registry, name, path, module, names)
            for path, own in rows.items():
                _train_rows(registry, name, path, modules[path], own)
            registry.retie(name)
            keep_still(registry, modules)
            registry.buffers.reclass()
            if has_distributed_parameters(model):
                spread(model, registry, name, drawn=init is not None)
    except BaseException:
        remove_adapter(registry, name)
        raise
    registry.places = Places(model, registry, registry.places)
    return adapter


def train_module(
    registry: Registry, name: str, path: str, module: nn.Module, names: Iterable[str]
) -> TrainedModule:
    """Give an adapter copies of a module's own tensors, and return the module as it is then.

    What is tied to a tensor elsewhere gets none: :meth:`Registry.retie` comes next.
    """
    adapter = registry.adapter(name)
    copies = _as_trained(module, registry, path)
    own = [role for role in names if (path, role) not in adapter.ties]
    with present(module):
        copies.lora_add_copy(name, own, chosen_dtype(adapter.config))
    adapter.places[path] = None
    return copies


def remove_adapter(registry: Registry, name: str) -> None:
    """Take an adapter's tensors away, and the patch off every module that carries no other."""
    registry.buffers.drop(name)
    registry.adapters.pop(name)
    if registry.places is not None:
        registry.places.stale = True
    for adopted in registry.adopted:
        if adopted.adapter == name:
            adopted.give_back()
    registry.adopted = [adopted for adopted in registry.adopted if adopted.adapter != name]
    # asked of all: where attaching stopped halfway, a module is patched and has no adapter yet
    for path, module in list(registry.modules.items()):
        if name in module.lora_adapters():
            module.lora_remove(name)
        if not module.lora_adapters():
            registry.exclusive.pop(path, None)
            registry.rows.pop(path, None)
            restore_class(registry.modules.pop(path))
            keep_still(registry, {path: module})
    registry.buffers.reclass()
    registry.routing.forget(name)


def keep_still(registry: Registry, modules: Mapping[str, nn.Module]) -> None:
    """Have the normalizations among these that no adapter trains use the statistics they have."""
    for path, module in modules.items():
        if has_statistics(module) and not isinstance(module, Patched):
            with contextlib.suppress(TypeError):  # its class forbids subclasses
                swap_class(module, patched_class(FrozenNorm, type(module)), registry.routing)
                assert isinstance(module, FrozenNorm)
                registry.norms[path] = module


def _as_layer(module: nn.Module, registry: Registry, path: str, read: Read) -> Adaptable:
    if not isinstance(module, Adaptable):
        _swap(module, registry, path, lambda m: layer_class(m, read))
        module.__dict__["lora_slots"] = {}
    assert isinstance(module, Adaptable)
    registry.modules[path] = module
    return module


def _as_trained(module: nn.Module, registry: Registry, path: str) -> TrainedModule:
    if not isinstance(module, TrainedModule):
        if isinstance(module, FrozenNorm):
            registry.norms = {p: norm for p, norm in registry.norms.items() if norm is not module}
            restore_class(module)
        names = tensor_names(module)
        _swap(module, registry, path, lambda m: patched_class(TrainedModule, type(m), names))
        module.__dict__.update(lora_copies={}, lora_tied={})
    assert isinstance(module, TrainedModule)
    registry.modules[path] = registry.exclusive[path] = module
    return module


def _train_rows(
    registry: Registry, name: str, path: str, module: nn.Module, rows: TokenRows
) -> None:
    """Give an adapter rows of a module, as they are there."""
    if not isinstance(module, TrainedRows):
        _swap(module, registry, path, rows_class)
        module.__dict__["lora_token_rows"] = {}
    assert isinstance(module, TrainedRows)
    registry.modules[path] = registry.rows[path] = module
    weight = parameter_of(module, "weight")
    assert weight is not None
    with present(module):
        dtype = copy_dtype(weight, chosen_dtype(registry.adapter(name).config))
        module.lora_add_rows(name, rows, dtype)
    registry.adapter(name).places[path] = None


def _swap(
    module: nn.Module,
    registry: Registry,
    path: str,
    make: Callable[[nn.Module], type[Patched]],
) -> None:
    host = type(module)
    try:
        swap_class(module, make(module), registry.routing)
    except TypeError as error:  # such as a class that forbids subclasses
        raise TargetError(f"{path}: {host.__name__} cannot be patched in place: {error}") from error


def _copied(
    modules: Mapping[str, nn.Module], trained: Iterable[str], ties: Ties
) -> dict[str, tuple[nn.Module, dict[str, None]]]:
    """Return the path of each module to it and those of its tensors that will be copies."""
    found = {
        path: (module, dict.fromkeys(tensor_names(module)))
        for top in trained
        for path, module in parts_with_tensors(modules[top], top)
    }
    for path, role in (*ties.values(), *ties):
        if path not in found:
            found[path] = modules[path], {}
        found[path][1][role] = None
    return found


def _conflicts(
    modules: dict[str, nn.Module],
    registry: Registry,
    name: str,
    slots: dict[str, LayerConfig],
    copied: Mapping[str, tuple[nn.Module, Iterable[str]]],
) -> list[str]:
    problems, silent = [], unheard(slots.keys(), modules)
    for path in slots:
        if path in registry.rows:
            problems.append(f"rows of {path} are trained by another adapter")
        if path in registry.exclusive:
            problems.append(f"{path} is trained in full by another adapter, or its bias is")
        if path in silent:
            problems.append(f"{path}: {silent[path]}")
        kind = kind_of(modules[path])
        kinds = (*(kind.lora_layout.roles if kind else ()), *bias_kinds(slots[path]))
        problems += _taken(path, modules[path], name, kinds)
    for path, (module, names) in copied.items():
        if path in slots or (path in registry.modules and path not in registry.exclusive):
            what = "trained rows" if path in registry.rows else "a low-rank update"
            problems.append(f"{path} has {what} from another adapter")
            continue
        if any(original.module is module for original in registry.originals):
            problems.append(f"{path} holds merged values, and not the base's; unmerge first")
        if has_foreign_forward(module):
            problems.append(f"{path} has a forward of its own, put there by another library")
        problems += _taken(path, module, name, map(copy_kind, names))
    return problems


def _taken(path: str, module: nn.Module, name: str, kinds: Iterable[str]) -> list[str]:
    return [
        f"{path} has something called {taken} already" for taken in taken_names(module, name, kinds)
    ]


def row_faults(
    modules: Mapping[str, nn.Module], registry: Registry, name: str, rows: Rows
) -> list[str]:
    """Return why modules cannot be given rows of another adapter, a line each."""
    low_rank, in_full = registry.adapted().low_rank, registry.exclusive.keys()
    problems = [*row_conflicts(rows, (), low_rank, in_full)]
    for path in rows:
        module = modules[path]
        if any(original.module is module for original in registry.originals):
            problems.append(f"{path} holds merged values, and not the base's; unmerge first")
        problems += _taken(path, module, name, (ROWS, *INDEX))
    return problems
