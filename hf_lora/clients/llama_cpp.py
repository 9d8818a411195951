"""Adapters as llama.cpp reads them: one GGUF file, and an Ollama ``Modelfile`` beside it.

Source: llama.cpp of November 2026, ``src/llama-adapter.cpp`` (what the runtime takes),
``convert_lora_to_gguf.py`` and ``conversion/`` (names and the order of rows). For each weight there
are ``NAME.lora_a`` (R, I) and ``NAME.lora_b`` (O, R), multiplied by ``adapter.lora.alpha`` / R,
R being that of the pair: that is all it knows of scales. Rows of B stand in the order in which the
converter puts those of the weight:

- q and k of Llama and its like: row i of the first half of a head, then row i of the second, ...
- the fused q, k, v of GPT-NeoX: all heads' q, then all k, then all v, instead of head by head.

GPT-2's ``Conv1D`` holds its weight transposed, and the GGUF does not; factors are the same in both.
"""

import re
from pathlib import Path
from typing import Any

import torch

from hf_lora.clients.source import Factors, Source
from hf_lora.errors import ConfigError
from hf_lora.kinds.lora import LOW_RANK
from hf_lora.planning.clients import (
    LLAMA_CPP,
    Architecture,
    llama_cpp_reasons,
    one_alpha,
    scaling_for,
)
from hf_lora.planning.records import some_paths

WEIGHTS = "adapter.gguf"
MODELFILE = "Modelfile"
INSTALL = "it needs the package gguf: pip install 'hf-lora[gguf]'"

_BLOCK = re.compile(r"\.(?:layers|h)\.(?P<number>[0-9]+)\.")
_MOST_BLOCKS = 4096
_QUERY, _KEY = "q_proj", "k_proj"
_MODELFILE = """\
# For `ollama create NAME -f Modelfile`. {base}
FROM {from_}
ADAPTER ./{weights}
"""


def gguf_or_none() -> Any:
    """Return the package ``gguf``, or None if it is not installed."""
    try:
        import gguf
    except ImportError:
        return None
    return gguf


def llama_cpp_faults(source: Source) -> list[str]:
    """Return why llama.cpp cannot use an adapter, or why it cannot be written for it here."""
    facts, base = source.facts, source.base
    tied = [] if base is not None and not base.tied else facts.tied
    faults = llama_cpp_reasons(
        source.classes,
        facts.slots,
        facts.trained,
        tied=tied,
        not_linear=facts.not_linear,
        buffers=facts.buffers,
        biases=facts.biases,
        rows=facts.rows,
    )
    kind = _architecture(source)
    if not source.classes:
        faults.append("what model it is for is not known here; name its base with base=")
    if gguf_or_none() is None:
        faults.append(INSTALL)
    elif kind is not None:
        names = _names(source, kind)
        nameless = [path for path in source.of_layout(LOW_RANK) if names[path] is None]
        if nameless:
            faults.append(f"it has no name for layers such as {some_paths(nameless)}")
    if kind is not None:
        moved = [path for path in facts.slots if _is_moved(path, kind)]
        unknown = [path for path in moved if _heads(source, path) is None]
        if unknown:
            faults.append(
                "the number of heads, by which rows are ordered, is not known here (name the base "
                f"with base=), or does not divide the rows; here of {some_paths(unknown)}"
            )
    return faults


def write_llama_cpp(source: Source, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Write an adapter with one alpha, the rest of each scale in B."""
    gguf = gguf_or_none()
    kind = _architecture(source)
    assert gguf is not None
    assert kind is not None
    slots = source.folder.slots
    alpha, names = one_alpha(slots.values()), _names(source, kind)
    writer = gguf.GGUFWriter(folder / WEIGHTS, kind.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(Path(source.name).name)
    folded = []
    for layer in source.layers():
        scaling = scaling_for(alpha, slots[layer.path])
        if scaling != layer.scaling:
            folded.append(layer.path)
        layer = layer.scaled(scaling, dtype)
        name = names[layer.path]
        _add(gguf, writer, f"{name}.weight.lora_a", layer.a)
        _add(gguf, writer, f"{name}.weight.lora_b", _ordered(source, kind, layer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = source.folder.base
    (folder / MODELFILE).write_text(
        _MODELFILE.format(
            base=f"FROM is the base, {base or 'a GGUF file'}: a GGUF file of it or its name there.",
            from_="./base.gguf",
            weights=WEIGHTS,
        )
    )
    notes = [f"llama-cli -m BASE.gguf --lora FOLDER/{WEIGHTS}, BASE.gguf being the base converted."]
    if folded:
        notes.insert(0, f"Scales other than {alpha:g} / r are in B of {some_paths(folded)}.")
    return notes


def in_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of q or k in llama.cpp's order: (H, 2, D/2) becomes (H, D/2, 2)."""
    each = len(rows) // heads // 2
    return rows.reshape(heads, 2, each, -1).transpose(1, 2).reshape(rows.shape)


def one_after_the_other(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of a fused q, k and v in its order: (H, 3, D) becomes (3, H, D)."""
    each = len(rows) // heads // 3
    return rows.reshape(heads, 3, each, -1).transpose(0, 1).reshape(rows.shape)


def _architecture(source: Source) -> Architecture | None:
    return next((LLAMA_CPP[name] for name in source.classes if name in LLAMA_CPP), None)


def _names(source: Source, kind: Architecture) -> dict[str, str | None]:
    """Return what llama.cpp calls each layer, from gguf's own table; None where it has no name."""
    gguf, paths = gguf_or_none(), source.folder.slots
    known = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.name), None)
    if known is None:
        return dict.fromkeys(paths)
    numbers = (_BLOCK.search(f".{path}.") for path in paths)
    blocks = 1 + max((int(found["number"]) for found in numbers if found), default=0)
    table = gguf.get_tensor_name_map(known, min(blocks, _MOST_BLOCKS))
    # the language model in a bigger one has the names that it has alone
    return {path: table.get_name(path.replace("language_model.", "")) for path in paths}


def _is_moved(path: str, kind: Architecture) -> bool:
    tail = path.rpartition(".")[2]
    return (kind.halves and tail in (_QUERY, _KEY)) or (kind.mixed and tail == "query_key_value")


def _heads(source: Source, path: str) -> int | None:
    """Return by how many heads the rows of a layer are ordered; None if that cannot be."""
    if source.base is None:
        return None
    heads = source.base.count("num_attention_heads")
    tail = path.rpartition(".")[2]
    if tail == _KEY:
        heads = source.base.count("num_key_value_heads") or heads
    held = source.folder.factors[path]
    rows = held.shapes[held.layout.roles[1]][0]
    parts = 2 if tail in (_QUERY, _KEY) else 3
    return heads if heads and rows % (heads * parts) == 0 else None


def _ordered(source: Source, kind: Architecture, layer: Factors) -> torch.Tensor:
    if not _is_moved(layer.path, kind):
        return layer.b
    heads = _heads(source, layer.path)
    assert heads is not None
    return in_halves(layer.b, heads) if kind.halves else one_after_the_other(layer.b, heads)


def _add(gguf: Any, writer: Any, name: str, tensor: torch.Tensor) -> None:
    kinds = gguf.GGMLQuantizationType
    if tensor.dtype == torch.bfloat16:
        data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kinds.BF16)
        writer.add_tensor(name, data, raw_dtype=kinds.BF16)
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.contiguous().numpy())
    elif tensor.dtype in (torch.float32, torch.float64):
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    else:
        raise ConfigError(f"{name}: llama.cpp has no adapters of type {tensor.dtype}")
