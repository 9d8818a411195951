"""Which library a model is from, asked without importing what only its own need."""

import sys
from typing import Any

from hf_lora.compat.transformers import is_pretrained as is_pretrained

_SAVING = {
    "diffusers.models.modeling_utils": "ModelMixin",
    "huggingface_hub.hub_mixin": "ModelHubMixin",
}


def has_own_saving(model: Any) -> bool:
    """Say whether a model is of another class that saves itself, and loads without being strict."""
    return any(
        name in sys.modules and isinstance(model, getattr(sys.modules[name], kind, ()))
        for name, kind in _SAVING.items()
    )
