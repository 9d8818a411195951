"""Adapters in the formats of MLX, diffusers, kohya's scripts and llama.cpp, in PEFT's notation.

A file is known by its keys, whatever it is called:

- mlx-lm 0.32 (``tuner/utils.py``): ``PATH.lora_a`` (I, R) and ``PATH.lora_b`` (R, O), and
  ``adapter_config.json`` with one scale.
- diffusers 0.42 (``loaders/lora_base.py``, ``loaders/peft.py``): PEFT's names, or those it had
  before (``.lora.down.weight``, ``processor.to_q_lora.down.weight``), below the name of a component
  of the pipeline; PEFT's configuration as JSON in the header, or alphas, or neither: then the scale
  is 1.
- kohya's sd-scripts (``networks/lora.py``): ``lora_unet_`` or ``lora_te_`` and the path with ``_``
  for ``.``, then ``.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``; scaled by alpha / R.
- llama.cpp (``src/llama-adapter.cpp``): a GGUF file with ``NAME.lora_a`` and ``NAME.lora_b``, and
  one alpha. Names and order of rows are llama.cpp's own, so it can be shown and not loaded.

Of a file with several components one is read, which is named as if it was a folder inside.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_lora.errors import AdapterFileError, UnsupportedAdapterError, listing
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.gguf_file import GGUFFile
from hf_lora.files.safe_json import is_number, parse_json, read_json
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.text import show, some

FOREIGN_FILES = (
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "lora.safetensors",
    "adapter.gguf",
)
"""What such files are called by those who write them, ourselves included."""

KOHYA = "kohya's format"
"""The format whose names have ``_`` for ``.``, for people."""

METADATA = "lora_adapter_metadata"
"""Where diffusers has a configuration in the header of a file."""

FLAT = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
"""How names begin in kohya's format, to the component of a pipeline that they are of."""

_ENDING, _GGUF = ".safetensors", ".gguf"
_PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "wte")
_LLAMA_CPP = re.compile(r"(?P<path>.+)\.weight\.lora_(?P<factor>[ab])")
_MLX = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[ab])")
_PROCESSOR = r"processor\.(?P<name>to_(?:q|k|v|out))_lora"
_FACTOR = re.compile(
    rf"(?P<path>.+)\.(?:lora_|lora\.|lora_linear_layer\.|{_PROCESSOR}\.)"
    r"(?P<factor>A|B|down|up)\.weight"
)
_ALPHA = re.compile(rf"(?P<path>.+?)(?:\.{_PROCESSOR})?(?:\.down\.weight)?\.alpha")
COMPONENT = re.compile(r"unet|prior|connectors|(?:transformer|text_encoder)(?:_[0-9]+)?")
"""What components of pipelines are called that adapters are made of."""

_IN_COMPONENT = re.compile(rf"(?P<component>{COMPONENT.pattern})\.(?P<path>.+)")


class _Stored(NamedTuple):
    key: str
    turned: bool = False
    """Whether the file has it transposed."""


class RenamedFile(TensorFile):
    """A file seen with other names for its tensors, some of them transposed, others left out."""

    def __init__(self, file: TensorFile, stored: Mapping[str, _Stored]):
        vars(self).update(vars(file))
        self._stored = stored
        held, types = self.shapes, self.dtypes
        self.shapes = {
            name: held[each.key][::-1] if each.turned else held[each.key]
            for name, each in stored.items()
        }
        self.dtypes = {name: types[each.key] for name, each in stored.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for ``names``, as :meth:`TensorFile.read` does."""
        asked = list(names)
        found = super().read([self._stored[name].key for name in asked])
        for name, (_, tensor) in zip(asked, found, strict=True):
            yield name, tensor.t().contiguous() if self._stored[name].turned else tensor

    def part(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return the numbers from one place to another of a flattened tensor."""
        ((_, tensor),) = self.read([name])
        return tensor.reshape(-1)[first:last]

    def pick(self, name: str, at: Sequence[int]) -> torch.Tensor:
        """Return single numbers of a flattened tensor, as float32."""
        ((_, tensor),) = self.read([name])
        return tensor.reshape(-1)[list(at)].float()


@dataclasses.dataclass(frozen=True)
class Foreign:
    """An adapter in a foreign format, in PEFT's notation."""

    format: str
    """Whose it is, for people."""

    file: TensorFile
    fields: dict[str, Any]
    """PEFT's, as far as the file says them."""

    scales: Mapping[str, float] | None
    """Path of each layer to the factor before its update; None where ``fields`` say it."""

    told: tuple[str, ...] = ()
    """What was taken for granted."""

    only_shown: str | None = None
    """Why it can be looked at and nothing else, if that is so."""

    def slots(self, ranks: Mapping[str, int | None]) -> dict[str, LayerConfig] | None:
        """Return each layer's numbers, if they are not in the fields."""
        if self.scales is None:
            return None
        scales = self.scales
        return {
            path: LayerConfig(r=rank, alpha=scales[path] * rank)
            for path, rank in ranks.items()
            if rank is not None
        }


def find_foreign(source: Path) -> Foreign | None:
    """Return the adapter in a foreign format that is at a path, or None if there is none.

    Args:
        source: A folder, or a file; either with the name of a component behind it.

    Raises:
        AdapterFileError: There is one that is not sound, or several.
        UnsupportedAdapterError: There is one of a kind that hf_lora does not implement.
    """
    component = None
    if not os.path.lexists(source) and COMPONENT.fullmatch(source.name):
        source, component = source.parent, source.name
    weights = _weights_at(source)
    if weights is None:
        return None
    if weights.suffix == _GGUF:
        return _llama_cpp(GGUFFile(weights))
    file = TensorFile(weights)
    if any(_MLX.fullmatch(key) for key in file.shapes):
        return _mlx(file)
    if any(_factor(key) for key in file.shapes):
        return _diffusion(file, component)
    return None


def _weights_at(source: Path) -> Path | None:
    if os.path.isfile(source):
        return source if source.suffix in (_ENDING, _GGUF) else None
    if not os.path.isdir(source) or os.path.lexists(source / WEIGHTS_FILE):
        return None
    named = [source / name for name in FOREIGN_FILES if os.path.isfile(source / name)]
    if len(named) > 1:
        raise AdapterFileError(
            f"{source} holds several adapters: {some([path.name for path in named])}; name the file"
        )
    return named[0] if named else None


def _mlx(file: TensorFile) -> Foreign:
    source = file.path.parent / CONFIG_FILE
    fields = read_json(source)
    kind = fields.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UnsupportedAdapterError(
            f"{source}: fine_tune_type is {show(kind)}; hf_lora reads adapters of type 'lora' only"
        )
    said = fields.get("lora_parameters")
    scale = said.get("scale") if isinstance(said, dict) else None
    if not isinstance(scale, int | float) or not is_number(scale) or not scale > 0:
        raise AdapterFileError(
            f"{source}: lora_parameters has no scale, a number above 0, but {show(scale)}"
        )
    stored: dict[str, _Stored] = {}
    paths: dict[str, None] = {}
    unknown = []
    for key, shape in file.shapes.items():
        found = _MLX.fullmatch(key)
        if found is None or len(shape) != 2:
            unknown.append(f"{key} {shape}")
            continue
        path = found["path"]
        paths[path] = None
        kind = "lora_embedding_" if path.rpartition(".")[2] in _EMBEDDINGS else "lora_"
        name = f"{_PREFIX}{path}.{kind}{found['factor'].upper()}"
        stored[name if kind != "lora_" else f"{name}.weight"] = _Stored(key, turned=True)
    _refuse(file, unknown)
    base = fields.get("model")
    fields = _fields(paths)
    if isinstance(base, str) and base:
        fields["base_model_name_or_path"] = base
    renamed = RenamedFile(file, stored)
    return Foreign("MLX's format", renamed, fields, dict.fromkeys(paths, float(scale)))


def _llama_cpp(file: GGUFFile) -> Foreign:
    kind, way = (file.said.get(name) for name in ("general.type", "adapter.type"))
    if (kind, way) != ("adapter", "lora"):
        raise AdapterFileError(
            f"{file.path} is a GGUF file of {show(kind)}, {show(way)}, and not of a LoRA adapter"
        )
    alpha = file.said.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not is_number(alpha) or alpha < 0:
        raise AdapterFileError(f"{file.path}: adapter.lora.alpha is {show(alpha)}, not a strength")
    found = {key: _LLAMA_CPP.fullmatch(key) for key in file.shapes}
    _refuse(file, [key for key, match in found.items() if match is None])
    pairs = {(m["path"], m["factor"].upper()): key for key, m in found.items() if m is not None}
    stored = {f"{_PREFIX}{p}.lora_{f}.weight": _Stored(key) for (p, f), key in pairs.items()}
    shapes = {path: file.shapes[key] for (path, factor), key in pairs.items() if factor == "A"}
    scales = {p: alpha / s[0] if alpha and s and s[0] else 1.0 for p, s in shapes.items()}
    return Foreign(
        "llama.cpp's format",
        RenamedFile(file, stored),
        _fields(shapes),
        scales,
        only_shown="it has llama.cpp's names and order of rows; use what it was made of",
    )


def _diffusion(file: TensorFile, component: str | None) -> Foreign:
    parts: dict[str, dict[str, _Stored]] = {}
    alphas: dict[str, dict[str, str]] = {}
    unknown, flat = [], False
    for key in file.shapes:
        part, inside = _split(key)
        flat |= key.startswith(tuple(FLAT))
        found, alpha = _factor(inside), _ALPHA.fullmatch(inside)
        if alpha is not None:
            alphas.setdefault(part, {})[_layer(alpha)] = key
        elif found is None or key.startswith(_PREFIX):
            unknown.append(key)
        else:
            path, factor = found
            name = f"{_PREFIX}{path}.lora_{factor}.weight"
            held = parts.setdefault(part, {})
            if name in held:
                unknown.append(f"{key} and {held[name].key} are the same tensor twice")
            held[name] = _Stored(key)
    _refuse(file, unknown)
    if component is None and len(parts) > 1:
        named = [part for part in parts if part]
        raise UnsupportedAdapterError(
            f"{file.path} holds adapters of several components: {', '.join(named)}; load each onto "
            f'its own: hf_lora.load(pipeline.{named[0]}, source, subfolder="{named[0]}")'
        )
    chosen = next(iter(parts)) if component is None else component
    if chosen not in parts:
        raise AdapterFileError(f"{file.path} holds no {chosen}, but {', '.join(parts)}")
    stored = parts[chosen]
    ranks = {_path(name): file.shapes[each.key][0] for name, each in stored.items() if _is_a(name)}
    renamed = RenamedFile(file, stored)
    said = _metadata(file, chosen)
    if said is not None:
        return Foreign("diffusers' format", renamed, {**said, "peft_type": "LORA"}, None)
    said_alpha = alphas.get(chosen, {})
    scales = {path: _scale(file, said_alpha.get(path), r) for path, r in ranks.items()}
    silent = [path for path in ranks if path not in said_alpha]
    told = (f"no alpha is said for {some(silent, 1)}: its updates are taken as they are",)
    format_ = KOHYA if flat else "diffusers' format"
    return Foreign(format_, renamed, _fields(ranks), scales, told if silent else ())


def _split(key: str) -> tuple[str, str]:
    """Return the component that a tensor is of, "" if none is named, and its name there."""
    for begin, component in FLAT.items():
        if key.startswith(begin):
            return component, key.removeprefix(begin)
    found = _IN_COMPONENT.fullmatch(key)
    return (found["component"], found["path"]) if found else ("", key)


def _factor(key: str) -> tuple[str, str] | None:
    """Return the path of a layer and which factor of it a tensor is."""
    found = _FACTOR.fullmatch(key)
    if found is None:
        return None
    return _layer(found), {"down": "A", "up": "B"}.get(found["factor"], found["factor"])


def _layer(found: re.Match[str]) -> str:
    """Return the path of a layer, which was below a processor once."""
    inside = found["name"]
    if inside is None:
        return found["path"]
    return f"{found['path']}.{inside}{'.0' if inside == 'to_out' else ''}"


def _refuse(file: TensorFile, unknown: list[str]) -> None:
    if unknown:
        raise UnsupportedAdapterError(
            listing(f"{file.path} holds tensors of a kind that hf_lora does not implement", unknown)
        )


def _metadata(file: TensorFile, component: str) -> dict[str, Any] | None:
    """Return what the header says of a component, if it says anything."""
    text = file.metadata.get(METADATA)
    if text is None:
        return None
    fields = parse_json(text.encode(), f"{file.path}: {METADATA}")
    begin = f"{component}." if component else ""
    found = {k.removeprefix(begin): v for k, v in fields.items() if k.startswith(begin)}
    return found or None


def _scale(file: TensorFile, key: str | None, r: int) -> float:
    if key is None:
        return 1.0
    shape = file.shapes[key]
    if math.prod(shape) != 1 or not file.dtypes[key].is_floating_point:
        raise AdapterFileError(f"{file.path}: {key} has shape {shape}, and is no number")
    ((_, tensor),) = TensorFile.read(file, [key])
    alpha = float(tensor)
    if not math.isfinite(alpha) or alpha <= 0 or r <= 0:
        raise AdapterFileError(f"{file.path}: {key} is {alpha}, not a number above 0")
    return alpha / r


def _fields(paths: Iterable[str]) -> dict[str, Any]:
    return {"peft_type": "LORA", "target_modules": sorted(paths)}


def _path(name: str) -> str:
    return name.removeprefix(_PREFIX).rpartition(".lora_")[0]


def _is_a(name: str) -> bool:
    return name.rpartition(".")[0].endswith("A")
