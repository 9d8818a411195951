"""Opening an adapter by the ``from_pretrained`` of a diffusers model, also as part of a pipeline.

A wrapped diffusers model saves its adapter, and no base, like any other model. diffusers itself
looks for a whole model in such a folder and ends there.
"""

import os
from pathlib import Path
from typing import Any

from hf_lora.adapter_io.load import load_folder
from hf_lora.errors import AdapterFileError
from hf_lora.files.read import is_adapter_folder, read_folder
from hf_lora.integrations import model_methods
from hf_lora.integrations.import_hooks import when_imported
from hf_lora.integrations.in_front import Original, patch_class
from hf_lora.layers.names import DEFAULT
from hf_lora.model.transaction import Transaction

_MODULE, _CLASS, _METHOD = "diffusers.models.modeling_utils", "ModelMixin", "from_pretrained"


def install() -> None:
    """Patch diffusers' models, now if they are imported, and otherwise when they will be."""
    when_imported(_MODULE, _patch)


def _patch(module: Any) -> None:
    ours = {_METHOD: _from_pretrained}
    patch_class(module, _CLASS, ours, "it cannot open the folder of an adapter")


def _from_pretrained(original: Original, cls: type, source: Any = None, **kwargs: Any) -> Any:
    """Load a model, or, from the local folder of an adapter, the base that it names and itself.

    Raises:
        AdapterFileError: As for :func:`hf_lora.load`, or the adapter names no base.
        AdapterMismatchError, BaseMismatchError: As for :func:`hf_lora.load`.
    """
    folder = Path(source) if isinstance(source, str | os.PathLike) else None
    inside = None if folder is None else folder / (kwargs.get("subfolder") or "")
    if inside is not None and _is_adapter_alone(inside):
        folder = inside
        kwargs.pop("subfolder", None)
    elif folder is None or not _is_adapter_alone(folder):
        return original(source, **kwargs)
    base = read_folder(folder).base
    if base is None:
        raise AdapterFileError(
            f"{folder} holds an adapter that names no base model; load a {cls.__name__} from where "
            "the base is, and call hf_lora.load(model, folder)."
        )
    model = original(base, **kwargs)
    # diffusers wants a pair where the caller asked what was loaded
    target = model[0] if isinstance(model, tuple) else model
    with Transaction(target) as change:
        load_folder(target, folder, change, adapter=DEFAULT, trainable=False, check_base=True)
        model_methods.install(target)
        change.commit()
    return model


def _is_adapter_alone(folder: Path) -> bool:
    return is_adapter_folder(folder) and not (folder / "config.json").exists()
