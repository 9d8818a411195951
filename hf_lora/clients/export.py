"""``servable`` and ``export``: who can use an adapter, and files as each client reads them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from hf_lora.clients.base import read_base
from hf_lora.clients.diffusion import (
    diffusers_faults,
    kohya_faults,
    write_diffusers,
    write_kohya,
)
from hf_lora.clients.llama_cpp import llama_cpp_faults, write_llama_cpp
from hf_lora.clients.merged_gguf import find_converter, write_merged
from hf_lora.clients.mlx import mlx_faults, write_mlx
from hf_lora.clients.peft_folders import peft_faults, vllm_faults, write_peft, write_vllm
from hf_lora.clients.records import Exported, Servable, Verdict
from hf_lora.clients.source import Source
from hf_lora.errors import ConfigError, UnsupportedAdapterError, listing
from hf_lora.files.new_folder import check_free, new_folder
from hf_lora.files.read import read_folder
from hf_lora.hub.download import locate

Name = str | os.PathLike[str]

_WHAT = "an adapter for another client"
_MERGED = (
    "merge_checkpoint(base, adapter, output) makes a plain checkpoint of it, which it can use."
)
_CONVERTED = (
    "merged=True makes one GGUF file of it and its base; so do merge_checkpoint(base, adapter, "
    "output) and llama.cpp's convert_hf_to_gguf.py."
)
_FOLDED = (
    "merge_and_unwrap(model) makes a plain model of it, which saves and loads as its base does."
)


class _Client(NamedTuple):
    faults: Callable[[Source], list[str]]
    """Returns why an adapter cannot go there."""

    write: Callable[[Source, Path, torch.dtype | None], list[str]]
    """Writes files into a folder; returns what to tell of them."""

    way: str
    """How an adapter comes there that can."""

    instead: str
    """What to do with one that cannot."""

    asks: bool = True
    """Whether it has to do with the base."""


CLIENTS = {
    "peft": _Client(peft_faults, write_peft, "as it is saved", _MERGED, asks=False),
    "vllm": _Client(vllm_faults, write_vllm, "as it is saved", _MERGED),
    "llama.cpp": _Client(llama_cpp_faults, write_llama_cpp, "exported", _CONVERTED),
    "mlx": _Client(mlx_faults, write_mlx, "exported", _MERGED),
    "diffusers": _Client(diffusers_faults, write_diffusers, "exported", _FOLDED),
    "kohya": _Client(kohya_faults, write_kohya, "exported", _FOLDED),
}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def servable(
    adapter: Name,
    *,
    base: Name | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Servable:
    """Tell which clients can use an adapter, and why others cannot.

    Of the base only the configuration is looked at, and only if it is on this machine, unless
    ``base`` names it; what depends on it is answered with that in mind.

    Args:
        adapter: Folder of an adapter, or its id on the Hub.
        base: Folder of its base or id on the Hub, instead of what the adapter names; of a diffusion
            model the folder of the component, or of its pipeline.
        revision: Branch, tag or commit of the adapter on the Hub.
        subfolder: Folder inside, for adapters with a name.
        token: For private repos.

    Returns:
        A verdict for each of peft, vllm, llama.cpp, ollama, mlx, diffusers and kohya, with all
        reasons; printable.

    Raises:
        AdapterFileError, HubError: As for :func:`hf_lora.load`.
        BaseLoadError: ``base`` has no configuration that can be read.
    """
    source = _source(adapter, base, revision, subfolder, token, fetch=False)
    verdicts = []
    for name, client in CLIENTS.items():
        faults = tuple(client.faults(source))
        way = (
            f'hf_lora.export(adapter, output, "{name}")' if client.way == "exported" else client.way
        )
        verdicts.append(Verdict(name, not faults, faults, client.instead if faults else way))
        if name == "llama.cpp":
            made = f"{way}, which writes a Modelfile, too"
            verdicts.append(
                Verdict("ollama", not faults, faults, client.instead if faults else made)
            )
    return Servable(source.name, source.base and source.base.name, tuple(verdicts))


def export(
    adapter: Name,
    output: Name,
    client: str,
    *,
    base: Name | None = None,
    dtype: str | torch.dtype | None = None,
    merged: bool = False,
    converter: Name | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Exported:
    """Write an adapter as another client reads it, exactly, or say why that cannot be.

    What a client computes with the files is what the adapter does, up to one rounding of B where
    the client knows one scale for all layers and the adapter has several.

    - ``peft``: the same tensors, with a configuration that PEFT understood years ago.
    - ``vllm``: the same with one rank for all layers, one of those that vLLM has memory for.
    - ``llama.cpp``: ``adapter.gguf``, and a ``Modelfile`` for Ollama. Needs the package ``gguf``.
    - ``mlx``: ``adapters.safetensors`` and ``adapter_config.json`` of mlx-lm.
    - ``diffusers``: ``pytorch_lora_weights.safetensors`` with its metadata.
    - ``kohya``: ``lora.safetensors`` with flattened names, and an alpha for each layer.

    Args:
        adapter: Folder of an adapter, or its id on the Hub.
        output: A folder that is not there yet. It is there when all of it is, or not at all.
        client: One of those above.
        base: Folder of its base or id on the Hub, instead of what the adapter names; of a diffusion
            model the folder of the component, or of its pipeline. Only the configuration is read;
            where it cannot be had, what depends on it is refused.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; by default that of the adapter.
        merged: Whether to write the base with the adapter merged into it, for ``llama.cpp`` alone:
            ``model.gguf``, through its own converter. For what no adapter file can say.
        converter: llama.cpp's ``convert_hf_to_gguf.py``, or the folder that it is in; by default
            the one on the PATH. It is run.
        revision: Branch, tag or commit of the adapter on the Hub.
        subfolder: Folder inside, for adapters with a name.
        token: For private repos.

    Returns:
        What was written, and how the client is told of it; printable.

    Raises:
        UnsupportedAdapterError: The client cannot use it; all reasons are named, and what to do.
        AdapterFileError, HubError: As for :func:`hf_lora.load`.
        BaseLoadError: The base has no configuration that can be read.
        ConfigError: There is no such client, type or converter.
        SaveError: ``output`` is there already, or cannot be written, or the converter failed.
    """
    if client not in CLIENTS:
        raise ConfigError(f"There is no client {client!r}; there are {', '.join(CLIENTS)}")
    wanted, target = _dtype(dtype), Path(output)
    if merged and client != "llama.cpp":
        raise ConfigError(f"merged=True is for llama.cpp; for {client}: {_MERGED}")
    program = find_converter(converter) if merged or converter is not None else None
    check_free(target, _WHAT)
    fetch = CLIENTS[client].asks
    source = _source(adapter, base, revision, subfolder, token, fetch=fetch)
    faults = [] if merged else CLIENTS[client].faults(source)
    if faults:
        raise UnsupportedAdapterError(
            listing(f"{source.name} cannot be used by {client}", faults, CLIENTS[client].instead)
        )
    with new_folder(target, _WHAT) as folder:
        if merged and program is not None:
            notes = write_merged(source.folder.directory, base, folder, wanted, program)
        else:
            notes = CLIENTS[client].write(source, folder, wanted)
        files = sorted(path.name for path in folder.iterdir())
    told = tuple(note.replace("FOLDER", str(target)) for note in notes)
    return Exported(source.name, client, str(target), tuple(files), told)


def _source(
    adapter: Name,
    base: Name | None,
    revision: str | None,
    subfolder: str | None,
    token: str | bool | None,
    *,
    fetch: bool,
) -> Source:
    found = locate(adapter, revision=revision, subfolder=subfolder, token=token)
    folder = read_folder(found)
    folder.check_usable()
    return Source(os.fspath(adapter), folder, read_base(base, folder, fetch=fetch))


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if found is None:
        raise ConfigError(f"dtype={dtype!r} is none of {', '.join(_DTYPES)}")
    return found
