"""Something to give a tiny model of any type: what its forward asks for, in several forms."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from examples.benchmarks.zoo_by_hand import INPUTS
from examples.benchmarks.zoo_models import FIRST_WORD, VOCABULARY, parts

_ROWS, _WORDS = 2, 12
_PIXELS = ("pixel_values", "pixel_values_videos", "flattened_patches")
_CHANNELS = ("num_channels", "in_channels", "in_chans", "num_input_channels")
_BINS = (
    "num_mel_bins",
    "feature_size",
    "input_feat_per_channel",
    "n_mels",
    "feature_projection_input_dim",
)


def _said(config: Any, *names: str, default: Any) -> Any:
    """Return what a configuration or a part of it says under the first of some names."""
    for name in names:
        for part in parts(config):
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, str):
                return value
    return default


def candidates(model: nn.Module, kind: str) -> Iterator[dict[str, Any]]:
    """Yield arguments for a model's forward; which of them it takes is found out by trying."""
    config: Any = model.config
    if kind in INPUTS:
        yield INPUTS[kind](config)
        return
    names = list(inspect.signature(model.forward).parameters)
    words = _words(config, names)
    some = False
    for pixels in _pixels(config, names):
        if words:
            yield {**words, **pixels}
        yield pixels
        some = True
    for sound in _sounds(config, names):
        yield {**sound, **{k: v for k, v in words.items() if k != "input_ids"}}
        if "input_ids" in words:
            yield {**words, **sound}
        some = True
    if words:
        yield words
    elif not some and not {"inputs_embeds", "hidden_states"}.isdisjoint(names):
        width = _said(config, "hidden_size", "d_model", default=32)
        first = "inputs_embeds" if "inputs_embeds" in names else "hidden_states"
        yield {first: _numbers(_ROWS, _WORDS, width)}


def _words(config: Any, names: list[str]) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    size = _said(config, "vocab_size", default=VOCABULARY)
    first = min(FIRST_WORD, max(size - 8, 0))
    found = {}
    for name, length in (("input_ids", _WORDS), ("decoder_input_ids", 6)):
        if name in names:
            ids = torch.randint(first, min(size, VOCABULARY), (_ROWS, length), generator=drawn)
            found[name] = ids
    if "bbox" in names:
        found["bbox"] = torch.tensor([1, 2, 3, 4]).expand(_ROWS, _WORDS, 4).clone()
    return found


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _pixels(config: Any, names: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    name = next(
        (n for n in ("pixel_values", "pixel_values_videos", "flattened_patches") if n in names),
        None,
    )
    if name is None:
        return
    sizes = _said(config, "image_size", "img_size", "input_size", default=32)
    if isinstance(sizes, dict):
        sizes = [sizes.get("height", 32), sizes.get("width", 32)]
    high, wide = list(sizes)[:2] if isinstance(sizes, Iterable) else (sizes, sizes)
    depth = _said(
        config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3
    )
    depth = depth if isinstance(depth, int) and depth <= 32 else 3
    frames = _said(config, "num_frames", "frames_per_clip", default=2)
    yield {name: _numbers(_ROWS, depth, high, wide)}
    yield {name: _numbers(_ROWS, frames if isinstance(frames, int) else 2, depth, high, wide)}
    if (high, wide) != (64, 64):
        yield {name: _numbers(_ROWS, depth, 64, 64)}


def _sounds(config: Any, names: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    bins = _said(
        config,
        "num_mel_bins",
        "feature_size",
        "input_feat_per_channel",
        "n_mels",
        "feature_projection_input_dim",
        default=80,
    )
    if "input_values" in names:
        yield {"input_values": _numbers(_ROWS, 1600)}
        yield {"input_values": _numbers(_ROWS, 1, 1600)}
        yield {"input_values": _numbers(_ROWS, _said(config, "max_length", default=64), bins)}
    if "input_features" in names:
        long = 2 * _said(config, "max_source_positions", default=32)
        mask = {"input_features_mask": torch.ones(_ROWS, long, dtype=torch.long)}
        more = mask if "input_features_mask" in names else {}
        yield {"input_features": _numbers(_ROWS, bins, long), **more}
        yield {"input_features": _numbers(_ROWS, long, bins), **more}
        yield {"input_features": _numbers(_ROWS, 1, long, bins)}


def outputs(model: nn.Module, given: dict[str, Any]) -> list[torch.Tensor]:
    """Run a model, its random numbers begun anew; return the floating-point tensors it gives."""
    torch.manual_seed(3)
    return list(_tensors(model(**given)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def fitting(model: nn.Module, kind: str) -> tuple[dict[str, Any], int, int]:
    """Return the arguments that reach most of a model's layers, how many, and how many there are.

    Raises:
        Exception: What the model said to the first that was tried, if it takes none of them.
    """
    leaves = [m for m in model.modules() if not list(m.children()) and list(m.parameters(False))]
    best: tuple[dict[str, Any], int] | None = None
    first: Exception | None = None
    for given in candidates(model, kind):
        called: set[int] = set()
        hooks = [m.register_forward_hook(lambda m, i, o, c=called: c.add(id(m))) for m in leaves]
        try:
            found = outputs(model, given)
            if not any(t.requires_grad for t in found):
                raise ValueError("nothing that it gives has a gradient")
            if not all(bool(t.isfinite().all()) for t in found):
                raise ValueError("what it gives is not finite")
            if best is None or len(called) > best[1]:
                best = given, len(called)
        except Exception as caught:  # whatever a stranger's forward raises
            first = first or caught
        finally:
            for hook in hooks:
                hook.remove()
    if best is None:
        raise first or TypeError(f"no arguments for {type(model).__name__}.forward are known")
    return best[0], best[1], len(leaves)
