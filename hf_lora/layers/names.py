"""The names of the parameters that hf_lora adds to a module, and of adapters.

Nothing else in the package spells these names, and nothing parses them: whether a parameter is
LoRA's is asked of the registry.
"""

import re
from typing import TypeGuard

from hf_lora.errors import ConfigError

DEFAULT = "default"
"""The adapter whose parameters carry no suffix, as in the texts that LoRA is taught with."""

REGISTRY = "_hf_lora"
"""The attribute of a wrapped model under which its registry is kept."""

HELD = "lora_buffers"
"""The attribute of a module for the buffers that adapters have of it; see ``layers.holding``."""

LORA_A = "lora_A"
LORA_B = "lora_B"
LORA_BIAS = "lora_bias"

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def is_adapter_name(name: object) -> TypeGuard[str]:
    """Say whether an adapter may be called so; see :func:`check_adapter_name`."""
    return isinstance(name, str) and _ADAPTER_NAME.fullmatch(name) is not None


def check_adapter_name(name: object) -> str:
    """Return ``name`` if an adapter may be called so.

    Raises:
        ConfigError: Not 1 to 64 letters, digits, ``_`` or ``-``. Names become parameter names and
            folder names, so dots and slashes would reach somewhere else.
    """
    if not is_adapter_name(name):
        raise ConfigError(
            f"An adapter cannot be called {name!r}: use 1 to 64 letters, digits, '_' or '-', "
            "beginning with a letter or digit."
        )
    return name


def parameter_name(kind: str, adapter: str) -> str:
    """Return the name of an added parameter: ``lora_A``, or ``lora_A_fr`` for adapter ``fr``."""
    return kind if adapter == DEFAULT else f"{kind}_{adapter}"


def factor_names(adapter: str) -> tuple[str, str]:
    """Return the names of an adapter's A and B."""
    return parameter_name(LORA_A, adapter), parameter_name(LORA_B, adapter)


def copy_kind(parameter: str) -> str:
    """Return the kind under which a trained copy of ``parameter`` is kept on its module."""
    return f"lora_copy_{parameter}"
