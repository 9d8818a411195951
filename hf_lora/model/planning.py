"""Making a plan: patterns against the model's modules, every problem collected."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from hf_lora.config import ALL_LINEAR, LoRAConfig
from hf_lora.layers.base import LoRALayer, Slot
from hf_lora.layers.hosts import adapter_dtype, features, rank_fault, why_not
from hf_lora.model.plan import Plan, Target, Trained
from hf_lora.targets import compile_target, first_match, nearest

_VLLM_HEADS = ("classifier", "score")


def make_plan(model: nn.Module, config: LoRAConfig) -> Plan:
    """Find out what ``config`` means on ``model``."""
    modules = dict(model.named_modules())
    head = output_head(model)
    problems: list[str] = []
    matches: dict[str, int] = {}
    left_out: dict[str, str] = {}

    trained_paths = dict.fromkeys(_trained_paths(modules, config.train, problems))
    excluded = _compile(config.exclude)
    overrides = {compile_target(pattern): fields for pattern, fields in config.overrides.items()}
    used: set[object] = set()
    chosen: list[str] = []
    for path, label in _candidates(modules, head, config, matches, left_out, problems):
        exclusion = first_match(excluded, path)
        used.add(exclusion)
        if exclusion is not None:
            left_out[path] = f"excluded by {excluded[exclusion]!r}"
        elif _inside(path, trained_paths):
            left_out[path] = "trained in full"
        else:
            matches[label] += 1
            chosen.append(path)
    for pattern, text in excluded.items():
        if pattern not in used:
            problems.append(f"exclude {text!r} matches none of the targeted layers")

    owners = _owners(modules)
    targets = []
    for path in chosen:
        module = modules[path]
        override = first_match(overrides, path)
        used.add(override)
        fields = {"r": config.r, "alpha": config.alpha, "dropout": config.dropout}
        fields |= overrides[override] if override is not None else {}
        fault = rank_fault(module, fields["r"])
        if fault:
            problems.append(f"{path}: {fault}")
        sizes = features(module)
        assert sizes is not None
        dtype = getattr(torch, config.dtype) if config.dtype else adapter_dtype(module)
        slot = Slot(**fields, rslora=config.rslora)
        host = module.lora_host if isinstance(module, LoRALayer) else type(module)
        targets.append(
            Target(path, host.__name__, *sizes, slot, dtype, _tied(module, path, owners))
        )
    for pattern, text in zip(overrides, config.overrides, strict=True):
        if pattern not in used:
            problems.append(f"overrides {text!r} matches none of the adapted layers")
    trained = tuple(_trained(modules, path, owners) for path in trained_paths)
    if not targets and not trained and not problems:
        problems.append("every matching layer is left out: " + _first(left_out))

    base = {id(p): p for p in model.parameters()}.values()
    return Plan(
        model=type(model).__name__,
        config=config,
        targets=tuple(targets),
        trained=trained,
        matches=matches,
        left_out=left_out,
        problems=tuple(problems),
        notes=tuple(_notes(modules, targets, trained)),
        vllm=tuple(_vllm(trained)),
        base_parameters=sum(p.numel() for p in base),
        base_bytes=sum(p.numel() * p.element_size() for p in base),
    )


def output_head(model: nn.Module) -> set[str]:
    """Return the paths of the linear layers that make up the output head.

    That is the output embedding, and whatever lies beside the backbone in a transformers model.
    """
    getter = getattr(model, "get_output_embeddings", None)
    embedding = getter() if callable(getter) else None
    backbone = getattr(model, "base_model", model)
    prefix = getattr(model, "base_model_prefix", "")
    beside = isinstance(backbone, nn.Module) and backbone is not model and bool(prefix)
    head = set()
    for path, module in model.named_modules():
        outside = beside and path and path != prefix and not path.startswith(f"{prefix}.")
        if module is embedding or outside:
            head.add(path)
    return head


def _candidates(
    modules: Mapping[str, nn.Module],
    head: set[str],
    config: LoRAConfig,
    matches: dict[str, int],
    left_out: dict[str, str],
    problems: list[str],
) -> Iterable[tuple[str, str]]:
    """Yield (path, the pattern that means it) for every layer that can be adapted."""
    attention = {
        f"{path}.{child}"
        for path, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_modules()
        if child
    }

    def reason(path: str, module: nn.Module) -> str | None:
        if path in attention:
            return "nn.MultiheadAttention reads its weights without calling it"
        return why_not(module)

    if config.targets == ALL_LINEAR:
        matches[ALL_LINEAR] = 0
        for path, module in modules.items():
            if features(module) is None:
                continue
            fault = "output head" if path in head else reason(path, module)
            if fault:
                left_out[path] = fault
            else:
                yield path, ALL_LINEAR
        return

    patterns = _compile(config.targets)
    meant: dict[str, list[str]] = {text: [] for text in patterns.values()}
    matches.update(dict.fromkeys(meant, 0))
    adaptable: dict[str, int] = dict.fromkeys(meant, 0)
    for path, module in modules.items():
        fault: str | None = ""
        for pattern, text in patterns.items():
            if pattern.fullmatch(path):
                meant[text].append(path)
                if fault == "":
                    fault = reason(path, module)
                    if fault is None:
                        yield path, text
                    elif next(module.parameters(), None) is not None:
                        left_out[path] = fault
                adaptable[text] += fault is None
    for text, paths in meant.items():
        if not paths:
            problems.append(_no_match(text, modules))
        elif not adaptable[text]:
            why = reason(paths[0], modules[paths[0]])
            problems.append(
                f"{text!r} matches only modules that cannot be adapted "
                f"({len(paths)}; {paths[0] or 'the model itself'}: {why})"
            )


def _no_match(text: str, modules: Mapping[str, nn.Module]) -> str:
    pattern = compile_target(text)
    for path, module in modules.items():
        for name, tensor in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if tensor is not None and pattern.fullmatch(full):
                return (
                    f"{text!r} means the parameter {full} of shape {tuple(tensor.shape)}, not a "
                    "layer; only linear layers can be adapted"
                )
    linear = [path for path, module in modules.items() if features(module) is not None]
    near = nearest(text, linear) or sorted({path.rsplit(".", 1)[-1] for path in linear})[:8]
    return f"{text!r} matches no module; near: {', '.join(near) or 'no linear layer at all'}"


def _trained_paths(
    modules: Mapping[str, nn.Module], patterns: Iterable[str], problems: list[str]
) -> list[str]:
    found: list[str] = []
    for pattern, text in _compile(patterns).items():
        meant = [path for path in modules if path and pattern.fullmatch(path)]
        with_tensors = [p for p in meant if next(modules[p].parameters(), None) is not None]
        if not with_tensors:
            kind = "only modules without parameters" if meant else "no module"
            near = nearest(text, modules)
            problems.append(f"train {text!r} matches {kind}; near: {', '.join(near) or 'none'}")
        found.extend(path for path in with_tensors if path not in found)
    return [path for path in found if not _inside(path.rpartition(".")[0], set(found))]


def _trained(
    modules: Mapping[str, nn.Module], path: str, owners: Mapping[int, list[str]]
) -> Trained:
    module = modules[path]
    tensors = list(module.parameters())
    tied = {
        other
        for tensor in tensors
        for other in owners.get(id(tensor), [])
        if not _inside(other, {path})
    }
    return Trained(
        path,
        type(module).__name__,
        sum(t.numel() for t in tensors),
        sum(t.numel() * t.element_size() for t in tensors),
        tuple(sorted(tied)),
    )


def _compile(patterns: Iterable[str]) -> dict:
    return {compile_target(pattern): pattern for pattern in patterns}


def _inside(path: str, parents: Collection[str]) -> bool:
    """Say whether ``path`` is one of ``parents`` or lies below one."""
    while path:
        if path in parents:
            return True
        path = path.rpartition(".")[0]
    return False


def _owners(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for tensor in module._parameters.values():
            if tensor is not None:
                owners.setdefault(id(tensor), []).append(path)
    return owners


def _tied(module: nn.Module, path: str, owners: Mapping[int, list[str]]) -> tuple[str, ...]:
    weight = module._parameters.get("weight")
    return tuple(other for other in owners.get(id(weight), []) if other != path)


def _notes(
    modules: Mapping[str, nn.Module], targets: list[Target], trained: tuple[Trained, ...]
) -> Iterable[str]:
    for item in (*targets, *trained):
        if item.tied_to:
            yield f"{item.path} shares its weight with {', '.join(item.tied_to)}; merging unties it"
    experts = [
        f"{path}.{name}"
        for path, module in modules.items()
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.dim() == 3 and "experts" in path
    ]
    if experts:
        yield f"{len(experts)} stacked expert parameters stay frozen (first: {experts[0]})"


def _vllm(trained: tuple[Trained, ...]) -> Iterable[str]:
    for item in trained:
        if item.path.rsplit(".", 1)[-1] not in _VLLM_HEADS:
            yield f"it refuses modules trained in full, here {item.path}"


def _first(left_out: Mapping[str, str]) -> str:
    path, reason = next(iter(left_out.items()), ("", "nothing matches"))
    return f"{path} ({reason})" if path else reason
