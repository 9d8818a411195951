"""The methods of a transformers model that are replaced on a wrapped instance.

The class stays as it is; the instance answers ``save_pretrained``, ``push_to_hub`` and the adapter
methods of transformers' own PEFT mixin itself. They are plain functions, bound by objects of ours,
so that copying and pickling the model carries them along, bound to the copy: a bound method would
be pickled by its name, and come back as the method of the class. And it would hold the model that
holds it, so that ``del model`` would free nothing before the next collection.
"""

import inspect
import os
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.load import load_folder
from hf_lora.compat.libraries import has_own_saving, is_pretrained
from hf_lora.config import LoRAConfig
from hf_lora.errors import AdapterFileError, StateError
from hf_lora.hub.download import locate
from hf_lora.hub.upload import push
from hf_lora.integrations import (
    diffusion_pipelines,
    fsdp1_guard,
    merged_push,
    peft_guard,
    preparing,
    references,
    vllm_weights,
    wrapped_inside,
)
from hf_lora.integrations.diffusion_files import attach
from hf_lora.integrations.diffusion_verbs import VERBS
from hf_lora.integrations.own_methods import FLAG, OwnMethod
from hf_lora.integrations.save_merged import SaveMerged
from hf_lora.integrations.save_pretrained import save_pretrained
from hf_lora.integrations.trainer import patch as trainer_patch
from hf_lora.layers.names import DEFAULT
from hf_lora.model.adapters import add, as_config, delete_adapter
from hf_lora.model.choices import Names, activate, active_adapters
from hf_lora.model.registry import registry_of
from hf_lora.model.transaction import JOURNAL, Transaction


class Owner:
    """A model that the methods on it do not keep alive.

    ``build().save_pretrained(folder)`` drops the model before the call: then a stand-in answers,
    which has all that the model had.
    """

    def __init__(self, model: nn.Module):
        fields = {
            key: value
            for key, value in vars(model).items()
            # the journal of the change that puts this here would hold the model for ever
            if key != JOURNAL and not isinstance(value, OwnMethod)
        }
        self.__setstate__((model, type(model), fields))

    def __setstate__(self, state: tuple[nn.Module | None, type[nn.Module], dict[str, Any]]) -> None:
        model, self._kind, self._fields = state
        self._model = None if model is None else weakref.ref(model)

    def __getstate__(self) -> tuple[nn.Module | None, type[nn.Module], dict[str, Any]]:
        # the fields are copied as the model's own are: its copy and this one's share them
        return self._alive(), self._kind, self._fields

    def _alive(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    def model(self) -> nn.Module:
        """Return the model, or what stands in for it if nobody else has it any more."""
        model = self._alive()
        if model is None:
            model = object.__new__(self._kind)
            vars(model).update(self._fields)
        return model


class Bound(OwnMethod):
    """A function as a method of one model; it brings hf_lora's patches along in a pickle."""

    def __init__(self, function: Callable[..., Any], owner: Owner):
        self.function = function
        self.owner = owner

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        install_patches()

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.function)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the model."""
        return self.function(self.owner.model(), *args, **kwargs)


def install(model: nn.Module) -> None:
    """Replace the methods on this instance, if its library saves and loads such models.

    What stood there, put by another library or by an earlier merge, comes back with ``uninstall``.
    """
    pretrained = is_pretrained(model)
    if not pretrained and not has_own_saving(model):
        return
    registry = registry_of(model)
    for name in (*_ALL, FLAG):
        before = model.__dict__.get(name)
        if before is not None and name not in registry.methods and not _is_ours(name, before):
            registry.methods[name] = before
            if isinstance(before, Bound) and isinstance(before.function, SaveMerged):
                registry.merged_before = before.function.names
    if pretrained:
        # lets a quantized base pass Trainer's guard; whatever else reads the flag is replaced here
        model.__dict__[FLAG] = True
    owner = Owner(model)
    for name, function in _ALL.items():
        if (pretrained and name in _METHODS) or hasattr(type(model), name):
            model.__dict__[name] = Bound(function, owner)


def _is_ours(name: str, value: Any) -> bool:
    if name == FLAG:
        return value is True
    return isinstance(value, Bound) and value.function is _ALL[name]


def install_patches() -> None:
    """Hook into other libraries, each now if it is imported, and otherwise when it will be."""
    for hooks in (
        trainer_patch,
        peft_guard,
        fsdp1_guard,
        merged_push,
        preparing,
        references,
        vllm_weights,
        wrapped_inside,
        diffusion_pipelines,
    ):
        hooks.install()


def _push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
    adapter: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> str:
    """Push the adapters and a model card in one commit; see :func:`hf_lora.push_to_hub`."""
    return push(
        model,
        repo_id,
        adapter=adapter,
        private=private,
        dtype=dtype,
        revision=revision,
        create_pr=create_pr,
        token=token,
        commit_message=commit_message,
        commit_description=commit_description,
        tags=tags or (),
    )


def _load_adapter(
    model: nn.Module,
    peft_model_id: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    *,
    is_trainable: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    check_base: bool = True,
    hotswap: bool | str = "auto",
    replace: bool = False,
    peft_config: Any = None,
    adapter_state_dict: Mapping[str, torch.Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
) -> None:
    """Attach another adapter and use it; see :func:`hf_lora.load`.

    ``hotswap=True`` is transformers' word for ``replace=True``. diffusers' pipelines hand over
    tensors and PEFT's configuration instead of a folder. Nothing is made twice in any case, so
    that ``low_cpu_mem_usage`` makes no difference.
    """
    name = adapter_name or DEFAULT
    if adapter_state_dict is not None:
        fields = peft_config if isinstance(peft_config, Mapping) else peft_config.to_dict()
        attach(model, adapter_state_dict, fields, name, replace=replace or hotswap is True)
        return
    if peft_model_id is None or peft_config is not None:
        raise AdapterFileError(
            "load_adapter needs a folder or a repository, or adapter_state_dict and peft_config."
        )
    folder = locate(peft_model_id, revision=revision, subfolder=subfolder, token=token)
    with Transaction(model) as change:
        load_folder(
            model,
            folder,
            change,
            adapter=name,
            trainable=is_trainable,
            check_base=check_base,
            replace=replace or hotswap is True,
        )
        activate(model, name)
        change.commit()


def _add_adapter(
    model: nn.Module, adapter_config: LoRAConfig, adapter_name: str | None = None
) -> None:
    """Add a fresh adapter and use it; see :func:`hf_lora.add_adapter`."""
    name = adapter_name or DEFAULT
    with Transaction(model) as change:
        add(model, name, as_config(None, adapter_config, {}))
        activate(model, name)
        change.commit()


def _set_adapter(model: nn.Module, adapter_name: Names) -> None:
    """Use these adapters; see :func:`hf_lora.activate`."""
    activate(model, adapter_name)


def _disable_adapters(model: nn.Module) -> None:
    """Use the base alone, until ``enable_adapters``."""
    routing = registry_of(model).routing
    if routing.active:
        routing.disabled = routing.now().chosen
    activate(model, ())


def _enable_adapters(model: nn.Module) -> None:
    """Use the adapters that were in use before ``disable_adapters``."""
    routing = registry_of(model).routing
    if not routing.active:
        activate(model, dict(routing.disabled))


def _active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters in use."""
    return list(active_adapters(model))


def _delete_adapter(model: nn.Module, adapter_names: str | list[str]) -> None:
    """Delete adapters; see :func:`hf_lora.delete_adapter`."""
    delete_adapter(model, adapter_names)


def _get_adapter_state_dict(
    model: nn.Module,
    adapter_name: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the tensors of one adapter under their names in the model."""
    registry = registry_of(model)
    name = adapter_name or next(iter(registry.routing.active or registry.adapters))
    keys = [key for *_, key in registry.keys(name)]
    source = model.state_dict() if state_dict is None else state_dict
    return {key: source[key] for key in keys}


def _resize_token_embeddings(
    model: nn.Module,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> Any:
    """Refuse to replace the embeddings, and answer calls that would leave them as they are."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    size = embeddings.weight.shape[0]
    wanted = size if new_num_tokens is None else new_num_tokens
    if pad_to_multiple_of is not None:
        wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
    if wanted != size:
        raise StateError(
            f"resize_token_embeddings({new_num_tokens}) would replace embeddings of {size} tokens "
            "under the adapters: new rows would be frozen, or lost with the adapter that is saved "
            "without them. Resize first, then wrap; hf_lora.unwrap(model) takes adapters off."
        )
    return embeddings


def _tie_weights(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Tie the base's tensors, and an adapter's copies of them; never the one to the other."""
    registry = registry_of(model)
    of_class: Any = type(model)
    own = registry.methods.get("tie_weights") or types.MethodType(of_class.tie_weights, model)
    # while an adapter is in use, its copies are what transformers would read, and tie to
    with registry.routing.base_read():
        own(*args, **kwargs)
    for name in registry.adapters:
        registry.retie(name)


def _dequantize(model: nn.Module, *_: Any, **__: Any) -> None:
    """Refuse to replace the layers that carry adapters by new ones."""
    raise StateError(
        "dequantize() would put new layers in the place of those that carry adapters. Take the "
        "adapters over by way of a folder: hf_lora.save(model, folder), hf_lora.unwrap(model), "
        "model.dequantize(), hf_lora.load(model, folder)."
    )


_METHODS = {
    "dequantize": _dequantize,
    "resize_token_embeddings": _resize_token_embeddings,
    "save_pretrained": save_pretrained,
    "tie_weights": _tie_weights,
    "push_to_hub": _push_to_hub,
    "load_adapter": _load_adapter,
    "add_adapter": _add_adapter,
    "set_adapter": _set_adapter,
    "disable_adapters": _disable_adapters,
    "enable_adapters": _enable_adapters,
    "active_adapters": _active_adapters,
    "delete_adapter": _delete_adapter,
    "get_adapter_state_dict": _get_adapter_state_dict,
}
_DIFFUSION = {
    **VERBS,
    "enable_lora": _enable_adapters,
    "disable_lora": _disable_adapters,
}
"""What diffusers' models have besides, or instead."""

_ALL = {**_METHODS, **_DIFFUSION}
