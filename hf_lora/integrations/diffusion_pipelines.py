"""The verbs that diffusers' pipelines have for adapters, where a component is a wrapped model.

diffusers' own look for PEFT's layers in each component; where there are none they do nothing. Seen
in diffusers 0.42, ``loaders/lora_base.py``.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_lora.errors import ConfigError, StateError
from hf_lora.integrations import diffusion_verbs as verbs
from hf_lora.integrations.diffusion_files import of_model
from hf_lora.integrations.import_hooks import when_imported
from hf_lora.integrations.in_front import Original, patch_class
from hf_lora.model.choices import activate, active_adapters
from hf_lora.model.registry import find, registry_of

_MODULE, _CLASS = "diffusers.loaders.lora_base", "LoraBaseMixin"


def install() -> None:
    """Patch diffusers' pipelines, now if they are imported, and otherwise when they will be."""
    when_imported(_MODULE, _patch)


def _patch(module: Any) -> None:
    words = "its pipelines' verbs for adapters do nothing to wrapped models"
    patch_class(module, _CLASS, _METHODS, words)


def _ours(pipeline: Any) -> dict[str, nn.Module]:
    """Return the wrapped components of a pipeline by name.

    Raises:
        StateError: Others have PEFT's adapters: one call would have to mean two things.
    """
    parts = {n: getattr(pipeline, n, None) for n in pipeline._lora_loadable_modules}
    modules = {n: part for n, part in parts.items() if isinstance(part, nn.Module)}
    found = {name: part for name, part in modules.items() if find(part) is not None}
    others = [n for n, part in modules.items() if n not in found and hasattr(part, "peft_config")]
    if found and others:
        raise StateError(
            f"Of this pipeline {', '.join(found)} has hf_lora's adapters and {', '.join(others)} "
            "has PEFT's. Call the verbs of each component, or load all by the same library."
        )
    return found


def _list(original: Original, pipeline: Any) -> dict[str, list[str]]:
    """Return the adapters of each component."""
    ours = _ours(pipeline)
    return {name: list(registry_of(part).adapters) for name, part in ours.items()} or original()


def _active(original: Original, pipeline: Any) -> list[str]:
    """Return the adapters that some component uses."""
    ours = _ours(pipeline)
    if not ours:
        return original()
    return list(dict.fromkeys(name for part in ours.values() for name in active_adapters(part)))


def _set(
    original: Original, pipeline: Any, adapter_names: str | list[str], adapter_weights: Any = None
) -> None:
    """Use these adapters in each component that has them, and none in others."""
    ours = _ours(pipeline)
    if not ours:
        return original(adapter_names, adapter_weights)
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    weights = (
        adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
    )
    if len(weights) != len(names):
        raise ConfigError(f"There are {len(names)} adapters and {len(weights)} weights.")
    known = {name for part in ours.values() for name in registry_of(part).adapters}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"There is no adapter {', '.join(map(repr, unknown))} in this pipeline; it has "
            f"{', '.join(map(repr, sorted(known)))}."
        )
    chosen = {n: _choice(n, part, names, weights, ours) for n, part in ours.items()}
    for name, part in ours.items():
        activate(part, chosen[name])
    return None


def _choice(
    component: str, part: nn.Module, names: list[str], weights: list[Any], ours: Mapping[str, Any]
) -> dict[str, float]:
    found = {}
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, dict):
            if unknown := [each for each in weight if each not in ours]:
                raise ConfigError(f"{', '.join(unknown)} has no adapter in this pipeline.")
            weight = weight.get(component)
        if isinstance(weight, dict):
            raise ConfigError("hf_lora has no weight for each block of a model; give one number.")
        if name in registry_of(part).adapters:
            found[name] = 1.0 if weight is None else weight
    return found


def _disable(original: Original, pipeline: Any) -> None:
    """Use the base alone in each component."""
    ours: dict[str, Any] = dict(_ours(pipeline))
    if not ours:
        return original()
    for part in ours.values():
        part.disable_adapters()
    return None


def _enable(original: Original, pipeline: Any) -> None:
    """Use the adapters again that were in use."""
    ours: dict[str, Any] = dict(_ours(pipeline))
    if not ours:
        return original()
    for part in ours.values():
        part.enable_adapters()
    return None


def _delete(original: Original, pipeline: Any, adapter_names: str | list[str]) -> None:
    """Take adapters off each component that has them."""
    ours = _ours(pipeline)
    if not ours:
        return original(adapter_names)
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    for part in ours.values():
        here = [name for name in names if name in registry_of(part).adapters]
        if here:
            verbs.delete_adapters(part, here)
    return None


def _unload(original: Original, pipeline: Any) -> None:
    """Take every adapter off."""
    ours = _ours(pipeline)
    if not ours:
        return original()
    for part in ours.values():
        verbs.unload_lora(part)
    return None


def _fuse(
    original: Original,
    pipeline: Any,
    components: list[str] | None = None,
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
    **kwargs: Any,
) -> None:
    """Put adapters into the weights of each component that has them."""
    ours = _ours(pipeline)
    if not ours:
        return original(components, lora_scale, safe_fusing, adapter_names, **kwargs)
    for name in components or ours:
        if name in ours:
            verbs.fuse_lora(ours[name], lora_scale, safe_fusing, adapter_names)
    return None


def _unfuse(
    original: Original, pipeline: Any, components: list[str] | None = None, **kwargs: Any
) -> None:
    """Take them out again."""
    ours = _ours(pipeline)
    if not ours:
        return original(components, **kwargs)
    for name in components or ours:
        if name in ours and registry_of(ours[name]).routing.merged:
            verbs.unfuse_lora(ours[name])
    return None


def _save(
    original: Original,
    cls: type,
    save_directory: Any,
    lora_layers: dict[str, Any],
    lora_metadata: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Save the adapter of each wrapped model that is given for its layers."""
    layers, metadata = dict(lora_layers), dict(lora_metadata)
    for component, given in lora_layers.items():
        if isinstance(given, nn.Module) and find(given) is not None:
            verbs.check_safe(kwargs.get("safe_serialization", True))
            names = active_adapters(given)
            if len(names) != 1:
                raise StateError(
                    f"The {component} uses {len(names)} adapters ({', '.join(names)}), and a file "
                    "of diffusers' holds one: activate it alone."
                )
            layers[component], said = of_model(given, names[0])
            metadata[component] = metadata.get(component) or said
        elif isinstance(given, Mapping) and any(k.endswith((".lora_A", ".lora_B")) for k in given):
            raise StateError(
                f"These are names of hf_lora's own, which diffusers does not read. Give the model "
                f"itself: {component}_lora_layers=pipeline.{component}."
            )
    return original(save_directory, layers, metadata, *args, **kwargs)


_METHODS = {
    "get_list_adapters": _list,
    "get_active_adapters": _active,
    "set_adapters": _set,
    "disable_lora": _disable,
    "enable_lora": _enable,
    "delete_adapters": _delete,
    "unload_lora_weights": _unload,
    "fuse_lora": _fuse,
    "unfuse_lora": _unfuse,
    "_save_lora_weights": _save,
}
