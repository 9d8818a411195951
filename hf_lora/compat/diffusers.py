"""What diffusers does to the files of its adapters before a model is given them. Seen in 0.42."""

from collections.abc import Mapping
from typing import Any

METADATA = "lora_adapter_metadata"
"""Where a file's header has PEFT's configuration. Without it alpha would be taken for the rank."""

_WHERE = (
    "weight_name",
    "local_files_only",
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "subfolder",
)


def fetched(source: Any, where: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return tensors and metadata of a file, found as diffusers finds it, never a pickle.

    Without it a model's own verb would look in other places than a pipeline's.

    Raises:
        TypeError: diffusers does not take one of these arguments.
    """
    strange = sorted({*where} - {*_WHERE, "use_safetensors"})
    if strange:
        raise TypeError(f"load_lora_adapter has no argument {', '.join(strange)}")
    from diffusers.loaders.lora_base import _fetch_state_dict

    given: dict[str, Any] = {name: where.get(name) for name in _WHERE}
    return _fetch_state_dict(
        source,
        use_safetensors=True,
        user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
        allow_pickle=False,
        **given,
    )


def as_peft(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return factors under PEFT's names that may have one of diffusers' older ones.

    Without it files of before 2024 would not be read.
    """
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    return convert_unet_state_dict_to_peft(dict(tensors))
