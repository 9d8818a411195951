"""``combine``, ``subtract`` and ``resize``: adapters made of adapters, exactly or nearest."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.save import as_dtype
from hf_lora.algebra.assemble import assembled, check_finite, keys_of
from hf_lora.algebra.beside import beside
from hf_lora.algebra.layers import Layer, Term, combined, read_term
from hf_lora.algebra.method import SVD, Method, checked
from hf_lora.algebra.record import DerivedAdapter, relative
from hf_lora.algebra.sources import Adapter, Source, check_bases, check_layers, opened, weighed
from hf_lora.errors import ConfigError
from hf_lora.files.attention import without_outs
from hf_lora.layers.names import LORA_BIAS


def combine(
    adapters: Source | Iterable[Source] | Mapping[Any, float],
    weights: Sequence[float] | None = None,
    method: str | None = None,
    rank: int | None = None,
    *,
    energy: float | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    model: nn.Module | None = None,
    check_base: bool = True,
    token: str | bool | None = None,
) -> DerivedAdapter:
    """Make one adapter of several: of their updates' weighted sum, or of a merge of them.

    All is computed from the factors, in float64: a sum of four of rank 16 on a layer of 2048 x 2048
    takes milliseconds. Ranks, strengths, ways of scaling and layers may differ from adapter to
    adapter; what one has nothing for counts as zero. One adapter with the weight 1 is that adapter.

    - ``cat``: the sum, exactly. The rank is the sum of the ranks.
    - ``svd``: the adapter of a lower rank that is nearest to the sum (Frobenius norm). Without
      ``rank`` and ``energy``: of the lowest rank that loses nothing.
    - ``ties`` (arXiv 2306.01708) and ``dare`` (arXiv 2311.03099): the published rules, applied to
      the small matrix that each update is in the spaces that the factors share (KnOTS, arXiv
      2410.19735; core space, arXiv 2509.17786), and not to the entries of the weights. The bases
      are those that the updates decide themselves: neither the order of the adapters nor how an
      update is factored changes what ``ties`` gives.

    Biases on B are added up as the updates are. What is trained in full (modules, rows, the base's
    own biases) and buffers that moved are kept where all adapters have the same; if the weights add
    up to 1, ``cat`` and ``svd`` average them; else they are refused by name.

    Args:
        adapters: Folders, ids on the Hub or, with ``model``, names of its adapters; or a mapping
            from each to its weight.
        weights: A factor for each, also below zero; by default 1. One of weight 0 is left out.
        method: ``cat``, ``svd``, ``ties`` or ``dare``; by default ``svd`` where ``rank`` or
            ``energy`` is given, else ``cat``.
        rank: Highest rank of a layer.
        energy: Share of each layer's squared norm to keep, above 0 and at most 1: the rank is the
            lowest that does.
        density: Of ``ties`` and ``dare``: which share of the entries is kept.
        seed: Of ``dare``. The same seed drops the same entries.
        dtype: Type of the result's tensors; by default the widest of the adapters'.
        model: A wrapped model, some of whose adapters are named.
        check_base: Whether to refuse adapters that were trained on different bases.
        token: For private repos.

    Returns:
        The adapter, with the exact error of what it holds.

    Raises:
        ConfigError: An argument makes no sense, or the type cannot hold the result.
        AdapterFileError, HubError: As for :func:`hf_lora.load`.
        AdapterMismatchError: They are for different layers, or differ in what is trained in full.
        BaseMismatchError: They were trained on different bases.

    Example:
        >>> both = hf_lora.combine({"me/french": 0.7, "me/polite": 0.3}, rank=16)  # doctest: +SKIP
        >>> both.error.total, both.save("polite-french")  # doctest: +SKIP
    """
    how = checked(method, rank=rank, energy=energy, density=density, seed=seed)
    given = weighed(adapters, weights)
    own = as_dtype(dtype)
    with opened(given, model=model, token=token) as found:
        return _derived(found, how, own, _title(found, how), check_base=check_base)


def subtract(
    one: Source,
    other: Source,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | torch.dtype | None = None,
    model: nn.Module | None = None,
    check_base: bool = True,
    token: str | bool | None = None,
) -> DerivedAdapter:
    """Return the adapter whose updates are those of one without those of another.

    :func:`combine` with the weights 1 and -1: exact, of both ranks together, unless ``rank`` or
    ``energy`` asks for less. What both have in full stays if it is equal, and is refused if not.

    Args:
        one: Folder, id on the Hub or, with ``model``, name of an adapter.
        other: Likewise, what is taken away.
        rank, energy, dtype, model, check_base, token: As for :func:`combine`.

    Returns:
        The difference.

    Raises:
        ConfigError, AdapterFileError, HubError: As for :func:`combine`.
    """
    return combine(
        [one, other],
        [1.0, -1.0],
        rank=rank,
        energy=energy,
        dtype=dtype,
        model=model,
        check_base=check_base,
        token=token,
    )


def resize(
    adapter: Source,
    rank: int | None = None,
    *,
    energy: float | None = None,
    dtype: str | torch.dtype | None = None,
    model: nn.Module | None = None,
    token: str | bool | None = None,
) -> DerivedAdapter:
    """Give an adapter a lower rank: the nearest of that rank, in each layer.

    Layers whose rank is no higher already keep their tensors to the bit. Everything else that the
    adapter has is kept as it is.

    Args:
        adapter: Folder, id on the Hub or, with ``model``, name of an adapter.
        rank: Highest rank of a layer.
        energy: Share of each layer's squared norm to keep; with ``rank`` as well, up to that rank.
        dtype, model, token: As for :func:`combine`.

    Returns:
        The adapter, with the exact error of what it holds.

    Raises:
        ConfigError: Neither ``rank`` nor ``energy`` is given, or one makes no sense.
        AdapterFileError, HubError: As for :func:`combine`.
    """
    if rank is None and energy is None:
        raise ConfigError("Say what to resize to: rank=8, or energy=0.99 of what each layer does")
    how = checked(SVD, rank=rank, energy=energy)
    with opened([(adapter, 1.0)], model=model, token=token) as found:
        asked = [f"rank {rank}"] if rank is not None else []
        asked += [f"{energy:.6g} of the energy"] if energy is not None else []
        title = f"{found[0].name} resized to {' and '.join(asked)}"
        return _derived(found, how, as_dtype(dtype), title, check_base=False)


def _title(adapters: Sequence[Adapter], how: Method) -> str:
    shown = " + ".join(f"{adapter.weight:g} x {adapter.name}" for adapter in adapters)
    return f"{shown}, by {how.name}"


def _derived(
    adapters: Sequence[Adapter],
    how: Method,
    dtype: torch.dtype | None,
    title: str,
    *,
    check_base: bool,
) -> DerivedAdapter:
    """Check adapters against each other, and return what a method makes of them."""
    check_layers(adapters)
    if check_base:
        check_bases(adapters)
    used = [adapter for adapter in adapters if adapter.weight]
    held = beside(used, how)
    layers = _layers(used, how, dtype)
    norms = {path: layer.norm for path, layer in layers.items()}
    if not all(map(math.isfinite, norms.values())):
        raise ConfigError("The weights are so large that the result is no finite number")
    adapted = layers.keys()
    tensors: dict[str, torch.Tensor] = {}
    slots = {}
    for path, layer in layers.items():
        slots[path] = layer.config
        if (path in held.biased) is not layer.config.bias:
            slots[path] = dataclasses.replace(layer.config, bias=path in held.biased)
        names = keys_of(path, layer.held.layout, layer.config, adapted)
        tensors |= {names[role]: tensor.contiguous() for role, tensor in layer.tensors.items()}
    if dtype is not None:
        moved = {k: v.to(dtype) if v.is_floating_point() else v for k, v in held.tensors.items()}
        held.tensors.update(moved)
    data = assembled(used, slots, tensors, held)
    check_finite(data.tensors)
    error = relative({path: layer.residual for path, layer in layers.items()}, norms)
    told = [f"{a.name} has the weight 0 and was left out" for a in adapters if not a.weight]
    return DerivedAdapter(title, data, error, norms, (*told, *held.told))


def _layers(
    adapters: Sequence[Adapter], how: Method, dtype: torch.dtype | None
) -> dict[str, Layer]:
    """Return all layers, those that must have one rank together, one such group in memory."""
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.folder.factors)
    leaders = without_outs(dict.fromkeys(paths, None))  # type: ignore[arg-type]
    groups = {path: [path] for path in leaders}
    for path in paths.keys() - groups.keys():
        groups[path.rpartition(".")[0]].append(path)
    rslora = all(slot.rslora for adapter in adapters for slot in adapter.folder.slots.values())
    found: dict[str, Layer] = {}
    for group in groups.values():
        terms: dict[str, list[Term]] = {
            path: [read_term(a, path) for a in adapters if path in a.folder.factors]
            for path in group
        }
        found |= combined(terms, how, dtype, rslora=rslora)
    if any(layer.config.lora_bias for layer in found.values()):
        found = {path: _with_bias(layer) for path, layer in found.items()}
    return found


def _with_bias(layer: Layer) -> Layer:
    """Return a layer with a bias on B, zeros if it has none: files have one on all or none."""
    layout = layer.held.layout
    if LORA_BIAS in layer.tensors or LORA_BIAS not in layout.beside:
        return layer
    b = layer.tensors[layout.roles[1]]
    config = dataclasses.replace(layer.config, lora_bias=True)
    tensors = layer.tensors | {LORA_BIAS: b.new_zeros(len(b))}
    return Layer(config, layer.held, tensors, layer.norm, layer.residual)
