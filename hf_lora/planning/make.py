"""Making a plan: what the patterns mean on a model, what it costs and what is worth telling."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.kinds.lora import LOW_RANK
from hf_lora.kinds.table import kind_of
from hf_lora.layers.hosts import adapter_dtype, chosen_dtype
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.known_buffers import candidates
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.probe import host_class
from hf_lora.layers.quantized import buffer_bytes, numel, packed_elsewhere, stored_bytes
from hf_lora.layers.reading import out_projections, out_slot
from hf_lora.layers.roles import OWN_BIAS, Place, Ties
from hf_lora.layers.statistics import has_statistics
from hf_lora.layers.trained import copy_dtype, own_tensors, parts_with_tensors, tensor_names
from hf_lora.planning.biases import bias_faults, has_bias, other_biases
from hf_lora.planning.clients import llama_cpp_reasons, vllm_reasons
from hf_lora.planning.cost import per_rank
from hf_lora.planning.parts import parts_of
from hf_lora.planning.records import Adapted, Plan, Target, Trained, left_out_line
from hf_lora.planning.stacked import Stack, stacks
from hf_lora.planning.targets import NOTHING, Matches, match
from hf_lora.planning.ties import Owners, followers, full_name, notes
from hf_lora.planning.token_rows import row_conflicts, row_targets
from hf_lora.targets import inside


def make_plan(
    model: nn.Module, config: LoRAConfig, world: int = 1, others: Adapted | None = None
) -> Plan:
    """Find out what ``config`` means on ``model``, and for each of ``world`` processes.

    Args:
        model: The model; nothing of it is changed.
        config: What is wanted.
        world: How many processes it would be spread over.
        others: What the adapters that the model has are on.
    """
    problems = list(foreign_wrapper(model))
    others = others or Adapted()
    owners = Owners(model, others.stood)
    matches = NOTHING if problems else match(model, config, problems, owners)
    modules = dict(model.named_modules())
    outs = out_projections(matches.chosen, modules)
    targets = tuple(
        _target(path, modules[path], config, matches, owners, problems, outs.get(path))
        for path in matches.chosen
    )
    counted: set[Place] = set()
    trained = tuple(
        _trained(path, modules[path], config, owners, matches.ties, counted)
        for path in matches.trained
    )
    size = sum(map(numel, owners.tensors())) + sum(map(packed_elsewhere, modules.values()))
    biases = _biases(modules, config, targets, matches, owners, others, problems)
    problems += _conflicts(others, matches.chosen, matches.trained)
    full = {*matches.trained, *followers(matches.ties, matches.trained)}
    problems += row_conflicts(matches.rows, full, others.low_rank, others.in_full)
    problems += [
        f"train_rows: the bias of {item.path} is trained, and a module has its rows or its bias"
        for item in biases
        if item.path in matches.rows
    ]
    problems += owners.faults(matches.ties, matches.trained, others.low_rank)
    classes = class_names(model)
    not_linear = [target.path for target in targets if target.layout is not LOW_RANK]
    slots = {target.path: target.slot for target in targets}
    tops, others_biased = [item.path for item in trained], [item.path for item in biases]
    norms = tuple(_frozen_norms(modules, tops))
    plan = Plan(
        model=host_class(model).__name__,
        config=config,
        targets=targets,
        trained=trained,
        rows=tuple(row_targets(modules, config, matches.rows)),
        matches=matches.counts,
        left_out=matches.left_out,
        problems=tuple(problems),
        warnings=matches.unseen,
        missed=tuple(_missed(modules, matches, size)),
        notes=(*matches.notes, *_notes(modules, targets, matches)),
        vllm=tuple(
            vllm_reasons(
                classes,
                slots,
                tops,
                not_linear=not_linear,
                biases=others_biased,
                rows=matches.rows,
            )
        ),
        llama_cpp=tuple(
            llama_cpp_reasons(
                classes,
                slots,
                tops,
                tied=[target.path for target in targets if target.tied_to],
                not_linear=not_linear,
                biases=others_biased,
                rows=matches.rows,
            )
        ),
        base_parameters=size,
        base_bytes=sum(map(stored_bytes, owners.tensors()))
        + sum(map(buffer_bytes, modules.values())),
        towers=matches.towers,
        untouched=sum(map(numel, owners.outside(parts_adapted(targets), tops))),
        world=world,
        fresh=matches.fresh,
        unfilled=matches.unfilled,
        frozen_norms=norms,
        buffers=tuple(_buffers(model, {*tops, *norms})),
        ties=matches.ties,
        biases=biases,
        tied_bytes=_tied_bytes(modules, config, matches),
    )
    if world == 1:
        return plan
    shares, left_out = per_rank(model, plan, owners.named(), world)
    return dataclasses.replace(plan, per_rank=tuple(shares), notes=(*plan.notes, *left_out))


def class_names(model: nn.Module) -> list[str]:
    """Return the name of a model's class, and of those of transformers that it is derived from."""
    own, *above = host_class(model).__mro__
    return [own.__name__, *(k.__name__ for k in above if k.__module__.startswith("transformers."))]


def parts_adapted(targets: Iterable[Target]) -> dict[str, tuple[str, ...]]:
    """Return the path of each adapted module, and which of its parameters; none stands for all."""
    return {target.path: target.slot.parts for target in targets}


def foreign_wrapper(model: nn.Module) -> Iterator[str]:
    """Yield a line if the model is PEFT's wrapper of one: its parts are no parts of a model."""
    kind = type(model)
    if kind.__module__.startswith("peft."):
        yield (
            f"this is PEFT's {kind.__name__} around a model, with PEFT's adapters in it: take them "
            "off (model.unload(), or model.merge_and_unload()) and go on with the model that "
            "gives, or load what PEFT saved: hf_lora.load(base, folder)"
        )


def _target(
    path: str,
    module: nn.Module,
    config: LoRAConfig,
    matches: Matches,
    owners: Owners,
    problems: list[str],
    attention: str | None = None,
) -> Target:
    fields = {"r": config.r, "alpha": config.alpha, "dropout": config.dropout}
    # PEFT has one r and alpha for all of an attention
    override = matches.overrides.get(attention or path)
    if attention is not None and matches.overrides.get(path, override) != override:
        problems.append(f"{path}: it has the numbers of {attention}: name that in overrides")
    fields |= config.overrides[override] if override is not None else {}
    parts = matches.parts.get(path, ())
    kind = kind_of(module)
    assert kind is not None
    own = config.bias != "none" and bool(kind.lora_layout.beside) and has_bias(module)
    slot = LayerConfig(
        **fields, rslora=config.rslora, lora_bias=config.lora_bias, bias=own, parts=parts
    )
    slot = slot if attention is None else out_slot(slot)
    for fault in (kind.lora_rank_fault(module, slot.r), kind.lora_bias_fault(module, slot)):
        if fault:
            problems.append(f"{path or 'the model itself'}: {fault}")
    return Target(
        path=path,
        host=host_class(module).__name__,
        shapes=dict(kind.lora_shapes(module, slot)) | kind.lora_bias_shapes(module, slot),
        layout=kind.lora_layout,
        slot=slot,
        dtype=chosen_dtype(config) or adapter_dtype(module),
        tied_to=owners.others([(path, name) for name in parts or ("weight",)], path),
    )


def _trained(
    path: str,
    module: nn.Module,
    config: LoRAConfig,
    owners: Owners,
    ties: Ties,
    counted: set[Place],
) -> Trained:
    """Return what is known of a module that is trained, without what was counted before."""
    wanted = chosen_dtype(config)
    tensors = _tensors(module, path)
    everything = []
    for place, tensor in tensors.items():
        if ties.get(place, place) not in counted:
            counted.add(ties.get(place, place))
            everything.append(tensor)
    parameters = [tensor for tensor in everything if isinstance(tensor, nn.Parameter)]
    return Trained(
        path=path,
        host=host_class(module).__name__,
        parameters=sum(map(numel, parameters)),
        parameter_bytes=sum(numel(t) * copy_dtype(t, wanted).itemsize for t in parameters),
        bytes=sum(numel(t) * copy_dtype(t, wanted).itemsize for t in everything),
        tied_to=owners.others(tensors, path),
    )


def _biases(
    modules: Mapping[str, nn.Module],
    config: LoRAConfig,
    targets: Iterable[Target],
    matches: Matches,
    owners: Owners,
    others: Adapted,
    problems: list[str],
) -> tuple[Trained, ...]:
    """Return the modules of no adapted layer whose bias trains; what is wrong is a problem."""
    own = [target.path for target in targets if target.slot.bias]
    paths = []
    if config.bias == "all":
        paths = other_biases(modules, own, matches.trained, owners)
    problems += bias_faults(modules, [*own, *paths], owners, {*others.low_rank} - {*own})
    found = []
    for path in paths:
        bias = parameter_of(modules[path], OWN_BIAS)
        assert bias is not None
        size = numel(bias) * copy_dtype(bias, chosen_dtype(config)).itemsize
        host = host_class(modules[path]).__name__
        found.append(Trained(path, host, numel(bias), size, size, ()))
    return tuple(found)


def _tied_bytes(modules: Mapping[str, nn.Module], config: LoRAConfig, matches: Matches) -> int:
    """Return the size of what a file holds beside what trains: a tied tensor for each module."""
    wanted, ties = chosen_dtype(config), matches.ties
    beside = [
        tensor
        for path in followers(ties, matches.trained)
        for place, tensor in _tensors(modules[path], path).items()
        if ties.get(place, place) not in ties.values()
    ]
    tied = [parameter_of(modules[path], role) for path, role in ties if path in modules]
    again = sum(numel(t) * copy_dtype(t, wanted).itemsize for t in tied if t is not None)
    return again + sum(numel(t) * t.dtype.itemsize for t in beside)


def _tensors(module: nn.Module, path: str) -> dict[Place, torch.Tensor]:
    """Return all that a checkpoint holds of a module at ``path`` and of those below it."""
    return {
        (below, name): tensor
        for below, part in parts_with_tensors(module, path)
        for name, tensor in own_tensors(part, tensor_names(part))
    }


def _conflicts(others: Adapted, chosen: Iterable[str], trained: Iterable[str]) -> Iterator[str]:
    """Yield what other adapters on the model rule out: no module is adapted and trained in full."""
    for path in chosen:
        if path in others.in_full:
            yield f"{path} is trained in full by another adapter, or its bias is"
        if path in others.rows:
            yield f"rows of {path} are trained by another adapter"
    tops = set(trained)
    yield from (
        f"rows of {p} are trained by another adapter" for p in others.rows if inside(p, tops)
    )
    for path in others.low_rank:
        if inside(path, tops):
            yield f"{path} has a low-rank update from another adapter"


def _frozen_norms(modules: Mapping[str, nn.Module], trained: Collection[str]) -> Iterator[str]:
    """Yield the paths of the normalizations whose statistics would move if they were not frozen."""
    for path, module in modules.items():
        if has_statistics(module) and not inside(path, trained):
            yield path


def _buffers(model: nn.Module, left_out: Collection[str]) -> Iterator[str]:
    """Yield the names of the buffers that a training may move, outside of these modules."""
    for path, _, role, _ in candidates(model):
        if not inside(path, left_out):
            yield full_name((path, role))


def _missed(modules: Mapping[str, nn.Module], matches: Matches, size: int) -> Iterator[str]:
    """Yield a line for each reason why something stays as it is that the targets mean."""
    if matches.stacks:
        way = _way(modules, matches.stacks)
        share = 100 * sum(numel(stack.tensor) for stack in matches.stacks) / max(size, 1)
        yield (
            f"{len(matches.stacks)} stacked parameters, as experts have them, {share:.1f} % of the "
            f"model's, stay frozen (first: {matches.stacks[0].full_name}{way})"
        )
    reasons: dict[str, list[str]] = {}
    for path in matches.unfit:
        reasons.setdefault(matches.left_out[path], []).append(path)
    yield from (left_out_line(paths, reason) for reason, paths in reasons.items())
    yield from matches.silent


def _notes(
    modules: Mapping[str, nn.Module], targets: Iterable[Target], matches: Matches
) -> Iterator[str]:
    for item in targets:
        if item.tied_to:
            yield f"{item.path} shares its weight with {', '.join(item.tied_to)}; merging unties it"
    yield from notes(matches.ties, matches.trained)
    for path, rows in matches.rows.items():
        if rows.of is not None:
            yield f"{path} shares its weight with {rows.of}: the rows train in both"
    trained = set(matches.trained)
    stacked = [
        stack
        for stack in stacks(modules)
        if stack not in matches.stacks
        and not inside(stack.path, trained)
        and stack.name not in matches.parts.get(stack.path, ())
    ]
    if stacked:
        yield (
            f"{len(stacked)} stacked parameters, as experts have them, stay frozen "
            f"(first: {stacked[0].full_name}{_way(modules, stacked)})"
        )


def _way(modules: Mapping[str, nn.Module], stacked: Iterable[Stack]) -> str:
    """Return how stacked parameters can be named as targets, or that no update can reach them."""
    names = dict.fromkeys(
        f"{stack.path.rpartition('.')[2]}.{stack.name}"
        for stack in stacked
        if stack.name in parts_of(modules[stack.path])
    )
    return f"; targets can name {' and '.join(names)}" if names else "; no update reaches them"
