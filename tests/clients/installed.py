"""Other software that tests run, where it is installed."""

import importlib
import os
from typing import Any

import pytest

REQUIRED = "HF_LORA_TESTS_NEED_CLIENTS"
"""Set where all of it has to be there: what is missing fails instead of being skipped."""


def installed(name: str) -> Any:
    """Return a package that is not needed for anything else; skip the test if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get(REQUIRED):
            raise
        pytest.skip(f"{name} is not installed (pip install 'hf-lora[clients]'): {error}")
