"""Libraries' own ``save_pretrained``, for models that are not wrapped but have a part that is.

It would write every tensor, ours among them, under names that nothing reads; loading that, which
libraries do without being strict, gives the base again, in silence. So the adapter is saved here
too, or it is said why not.
"""

from typing import Any

from torch import nn

from hf_lora.adapter_io.owner import check_saves_as_one, owner
from hf_lora.errors import SaveError
from hf_lora.integrations.import_hooks import when_imported
from hf_lora.integrations.in_front import Original, patch_class
from hf_lora.integrations.save_pretrained import save_pretrained
from hf_lora.kinds.packed_experts import is_packed

_SAVERS = {
    "transformers.modeling_utils": "PreTrainedModel",
    "diffusers.models.modeling_utils": "ModelMixin",
    "huggingface_hub.hub_mixin": "ModelHubMixin",
}
_METHOD = "save_pretrained"


def install() -> None:
    """Patch what saves whole models, now where it is imported, and otherwise when it will be."""
    for name in _SAVERS:
        when_imported(name, _patch)


def _patch(module: Any) -> None:
    words = "saving a model of which a part is wrapped is unguarded"
    patch_class(module, _SAVERS[module.__name__], {_METHOD: _save}, words)


def _save(original: Original, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Save the adapter of a model, or all of one that has none."""
    check_saves_as_one(model)
    if owner(model) is None:
        _check_not_packed(model)
        return original(*args, **kwargs)
    return save_pretrained(model, *args, **kwargs)


def _check_not_packed(model: nn.Module) -> None:
    """Raise if a model has packed experts: saved as a whole, nobody could load it."""
    packed = [path for path, module in model.named_modules() if is_packed(module)]
    if packed:
        raise SaveError(
            f"{packed[0]} ({len(packed)} in all) is packed in 4 bits, for which checkpoints have "
            "no form. hf_lora.dequantize_experts(model) makes plain experts of them again, with "
            "what 4 bits have left; an adapter is saved without them, and loads onto the full base."
        )
