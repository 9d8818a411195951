"""Models that are a row of modules around a transformers model, which is what an adapter is of."""

import sys
from typing import Any

from torch import nn


def core_of(model: nn.Module) -> Any:
    """Return the transformers model inside a sentence-transformers model, or None.

    sentence-transformers saves each of its modules by itself, and that one by its own
    ``save_pretrained``; its own verbs for adapters mean that one as well. None also where there
    are several, as in a router: an adapter is then of one that its user chooses.
    """
    base = getattr(sys.modules.get("sentence_transformers.base.model"), "BaseModel", ())
    if not isinstance(model, base):
        return None
    transformers = sys.modules["transformers.modeling_utils"].PreTrainedModel
    found: list[nn.Module] = []
    for module in model.modules():
        inside = any(module is part for top in found for part in top.modules())
        if isinstance(module, transformers) and not inside:
            found.append(module)
    return found[0] if len(found) == 1 else None
