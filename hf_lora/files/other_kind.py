"""Full models and adapters do not share a folder: whoever opens it would apply one to the other.

transformers opens a folder with both as the model there plus the adapter: a merged model then has
the adapter twice.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from hf_lora.errors import SaveError
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE

_MODEL_CONFIG = "config.json"
_MODEL_WEIGHTS = re.compile(
    r"(?:(?:diffusion_)?(?:pytorch_)?model(?!_fsdp).*\.(?:safetensors|bin)(?:\.index\.json)?"
    r"|tf_model.*\.h5|flax_model.*\.msgpack)"
)
_ADAPTER = (CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin")


def full_model_in(names: Iterable[str]) -> str | None:
    """Return the name of a full model's weights among a folder's files, or None.

    A model is what has a configuration beside its weights; weights alone may be part of a
    checkpoint of something else.
    """
    names = set(names)
    found = sorted(name for name in names if _MODEL_WEIGHTS.fullmatch(name))
    return found[0] if found and _MODEL_CONFIG in names else None


def adapter_in(names: Iterable[str]) -> list[str]:
    """Return an adapter's files among a folder's."""
    names = set(names)
    return [name for name in _ADAPTER if name in names]


def check_no_model(directory: Path) -> None:
    """Raise SaveError if a full model is in a folder that is to hold an adapter."""
    found = full_model_in(_names(directory))
    if found is not None:
        raise SaveError(
            f"{directory} holds a full model ({found}). With an adapter beside it transformers "
            "would open the folder as that model plus the adapter, whatever base the adapter is "
            "for. Save the adapter into another folder. Nothing was written."
        )


def check_no_adapter(directory: Path) -> None:
    """Raise SaveError if an adapter is in a folder that is to hold a merged model."""
    found = adapter_in(_names(directory))
    if found:
        raise SaveError(
            f"{directory} holds an adapter ({', '.join(found)}). With a merged model beside it "
            "transformers would open the folder as that model plus the adapter, which is in it "
            "already. Save the merged model into another folder. Nothing was written."
        )


def _names(directory: Path) -> list[str]:
    return os.listdir(directory) if os.path.isdir(directory) else []
