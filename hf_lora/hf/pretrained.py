"""Whether a model is one of transformers' own, asked without importing what only those need."""

import sys
from typing import Any


def is_pretrained(model: Any) -> bool:
    """Say whether a model is a transformers ``PreTrainedModel``.

    Whoever has one has imported its class, which takes seconds; nobody else should pay for it.
    """
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)
