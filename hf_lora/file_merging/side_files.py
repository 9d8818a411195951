"""What stands beside a checkpoint's tensors: configuration, index, tokenizer, chat template."""

import copy
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_lora.adapter_io.vocabulary import embedding
from hf_lora.file_merging.measure import dtype_name
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.layers.kind import parameter_of

_TIE = "tie_word_embeddings"
_DTYPES = ("dtype", "torch_dtype")
WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")
"""How the names of files with a model's weights end."""

_FOLDERS = ("additional_chat_templates",)
_LISTED = "modules.json"
"""What names further folders that belong to a model, of sentence-transformers."""

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    "chat_template.jinja",
)


def merged_config(
    content: Mapping[str, Any],
    model: Any,
    *,
    untied: Iterable[str],
    dtype: torch.dtype | None,
    fresh: bool,
    dequantized: bool,
) -> dict[str, Any]:
    """Return the configuration of the merged checkpoint: the base's, with what is other.

    It stays in the words of the transformers that wrote it, for whoever reads them.

    Args:
        content: ``config.json`` of the base.
        model: The model that the adapters are for, on the meta device.
        untied: Names of tensors that are not one with others any more.
        dtype: The type that all numbers get, if they get one.
        fresh: Whether the checkpoint has a part that the base's does not have, such as a head.
        dequantized: Whether what the base has packed is not packed any more.
    """
    found = copy.deepcopy(dict(content))
    if dequantized:
        found.pop("quantization_config", None)
    before = model.config.to_dict()
    sections = list(_sections(found, model.config))
    if dtype is not None:
        named = [(part, key) for part, _ in sections for key in _DTYPES if key in part]
        for part, key in named or [(found, _DTYPES[0])]:
            part[key] = dtype_name(dtype)
    for part, config in sections:
        said = getattr(config, "vocab_size", None)
        if "vocab_size" in part and isinstance(said, int):
            part["vocab_size"] = said
    if fresh:
        found["architectures"] = [type(model).__name__]
        names = before.get("id2label") or {}
        found["id2label"] = {str(i): label for i, label in names.items()}
        found["label2id"] = {label: int(i) for i, label in names.items()}
        if before.get("problem_type"):
            found["problem_type"] = before["problem_type"]
    names = set(untied)
    if names:
        flags = _flags(model, names)
        for part, config in sections:
            if any(config is flag for flag in flags) and _can_be_untied(config):
                part[_TIE] = False
    return found


def merged_index(
    content: Mapping[str, Any], where: Mapping[str, str], total: int
) -> dict[str, Any]:
    """Return the index of the merged checkpoint: the base's, with the new tensors and sizes.

    Args:
        content: The base's.
        where: Name of each tensor to its file.
        total: How many bytes they have together.
    """
    metadata = content.get("metadata")
    said = dict(metadata) if isinstance(metadata, dict) else {}
    return {**content, "metadata": said | {"total_size": total}, "weight_map": dict(where)}


def carried(base: Path, adapter: Path | None) -> dict[str, Path]:
    """Return the files that belong to the merged checkpoint as they are: name to where it is.

    Args:
        base: The base's folder.
        adapter: An adapter's, whose tokenizer takes the place of the base's if it has one.
    """
    found = {name: base / name for name in sorted(os.listdir(base)) if _belongs(base / name)}
    for folder in _further(base):
        for path in sorted((base / folder).rglob("*")):
            if path.is_file():
                found[path.relative_to(base).as_posix()] = path
    own = [name for name in TOKENIZER if adapter is not None and (adapter / name).is_file()]
    if adapter is not None and "tokenizer_config.json" in own:
        found = {name: path for name, path in found.items() if name not in TOKENIZER}
        found |= {name: adapter / name for name in own}
    return found


def carry(files: Mapping[str, Path], target: Path) -> None:
    """Copy files into a folder."""
    for name, path in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


def _belongs(path: Path) -> bool:
    name = path.name
    return (
        path.is_file()
        and not name.startswith(".")
        and not name.endswith((*WEIGHTS, ".index.json"))
        and name not in ("config.json", "README.md", CONFIG_FILE, WEIGHTS_FILE)
    )


def _further(base: Path) -> list[str]:
    folders = [name for name in _FOLDERS if (base / name).is_dir()]
    if (base / _LISTED).is_file():
        folders += [
            path.name
            for path in sorted(base.iterdir())
            if path.is_dir() and path.name[:1].isdigit() and path.name not in folders
        ]
    return folders


def _sections(content: dict[str, Any], config: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield a configuration's text and what transformers made of it, and those inside of it."""
    yield content, config
    for name in getattr(config, "sub_configs", None) or {}:
        inside = content.get(name)
        if isinstance(inside, dict) and getattr(config, name, None) is not None:
            yield from _sections(inside, getattr(config, name))


def _flags(model: Any, untied: set[str]) -> list[Any]:
    """Return the configurations that say of untied tensors that they are tied."""
    found = []
    names = {id(p): name for name, p in model.named_parameters()}
    for part in model.modules():
        config = getattr(part, "config", None)
        if getattr(config, _TIE, False) is True:
            ends = (embedding(part, f"get_{end}_embeddings") for end in ("input", "output"))
            weights = (parameter_of(end, "weight") for end in ends if end is not None)
            if any(names.get(id(weight)) in untied for weight in weights):
                found.append(config)
    return found


def _can_be_untied(config: Any) -> bool:
    """Say whether a configuration takes it that embeddings are not tied.

    T5's never does, and takes it for a word about another thing, a scaling.
    """
    after = type(config).from_dict(config.to_dict() | {_TIE: False})
    return getattr(after, _TIE, None) is False
