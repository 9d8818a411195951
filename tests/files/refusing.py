"""A load that must fail, and leave the model and the folder exactly as they were."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import hf_lora
from hf_lora import AdapterFileError
from tests.oracle.tree import Tree
from tests.tiny import Net


def files_in(folder: Path) -> dict[str, bytes]:
    """Return every file below ``folder`` and its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refuse(
    directory: Path,
    *words: str,
    error: type[Exception] = AdapterFileError,
    model: nn.Module | None = None,
    **options: Any,
) -> str:
    """Load ``directory``; check the error, its words, and that nothing has changed."""
    model = Net() if model is None else model
    tree, files = Tree.of(model), files_in(directory)
    with pytest.raises(error) as caught:
        hf_lora.load(model, directory, **options)
    message = str(caught.value)
    assert isinstance(caught.value, hf_lora.HfLoRAError), message
    for word in words:
        assert word in message
    assert len(message) < 20_000
    assert message.replace("\n", "").isprintable()
    assert Tree.of(model) == tree
    if not any(tensor.is_meta for tensor in model.parameters()):
        assert tree.same_values(model)
    assert files_in(directory) == files
    return message
