"""A classifier's labels: from a model's configuration to that of the model that is loaded."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hf_lora.compat.deepspeed import shape_of
from hf_lora.files.labels import has_a_row_each
from hf_lora.files.read import AdapterFolder

_HEAD = re.compile(r"(?:.+\.)?(?:classifier|score)(?:\.out_proj)?\.weight")
"""What the weight is called that has a row for each label, in transformers' classifiers."""


def labels_of(model: nn.Module, copies: Iterable[torch.Tensor]) -> dict[str, Any] | None:
    """Return what a header keeps of a model's labels; None if nothing that it trains is about them.

    Args:
        model: The model.
        copies: The tensors of the modules that are trained in full.
    """
    config = getattr(model, "config", None)
    names = getattr(config, "id2label", None)
    if not isinstance(names, dict) or not names:
        return None
    if not has_a_row_each(len(names), map(shape_of, copies)):
        return None
    found: dict[str, Any] = {"id2label": {str(i): str(names[i]) for i in sorted(names)}}
    problem = getattr(config, "problem_type", None)
    return {**found, "problem_type": problem} if problem else found


def label_arguments(folder: AdapterFolder, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``from_pretrained`` of the base must be told of an adapter's labels.

    Of files that do not name them the number is that of the head's rows.

    Args:
        folder: The adapter.
        given: What the user passes; whatever it says of labels counts.
    """
    said = {"num_labels", "id2label", "label2id", "config"} & given.keys()
    if folder.labels and not said - {"num_labels"}:
        wanted = given.get("num_labels", len(folder.labels["id2label"]))
        if wanted == len(folder.labels["id2label"]):
            return {name: value for name, value in folder.labels.items() if name not in given}
    if said or folder.labels:
        return {}
    heads = [key for name, key in folder.others.items() if _HEAD.fullmatch(name)]
    rows = {folder.file.shapes[key][0] for key in heads if folder.file.shapes[key]}
    return {"num_labels": rows.pop()} if len(rows) == 1 else {}
