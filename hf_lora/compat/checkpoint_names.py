"""How transformers turns a checkpoint's tensors into a model's. ``core_model_loading`` of 5.24.

Names are converted by patterns, and some tensors are put together of others, or cut out of them:
one for each expert becomes a stack, a fused projection becomes three. Without it an adapter that
was trained on what a model has could not be found in what its checkpoint has.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def converted(
    model: nn.Module,
    names: Sequence[str],
    make: Callable[[str], Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what each tensor of a model is made of, from a checkpoint's names.

    The same steps as in ``convert_and_load_state_dict_in_model``, on stand-ins for tensors.

    Args:
        model: A model of transformers; its tensors may be on the meta device.
        names: All names of the checkpoint.
        make: Returns the stand-in for a tensor of the checkpoint: something that takes what
            transformers does with tensors (``torch.stack``, ``cat``, ``chunk``, ``transpose``).

    Returns:
        Name in the model to what its conversion gives; and name in the model to why it could not
        be converted.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    prefix, known = getattr(model, "base_model_prefix", ""), model.state_dict()
    collected: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:
            continue
        if pattern is None:
            found.setdefault(target, make(name))
        else:
            item = collected.setdefault(target, copy.deepcopy(by_pattern[pattern]))
            item.add_tensor(target, name, pattern, make(name))
    faults = {}
    for target, item in collected.items():
        try:
            for made, value in item.convert(target, model=model, config=model.config).items():
                found[made] = value[0] if isinstance(value, list) else value
        except Exception as error:  # whatever a step does that is no step on boxes
            steps = ", ".join(type(step).__name__ for step in item.operations)
            faults[target] = f"transformers makes it by {steps} ({error})"
    return found, faults
