"""What each of several processes keeps and sends in training, for each way to share the work.

Arithmetic on a plan: nothing is run, and no process is asked. N processes send each other data in
rings, so that of S bytes each sends S·(N-1)/N for an all-gather or a reduce-scatter, and twice that
for an all-reduce. What is kept for the backward pass (activations) is no part of it.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_lora.layers.quantized import stored_bytes
from hf_lora.model.plan import PerRank, Plan, Target

_MASTER = 4
"""Bytes of each number that DeepSpeed steps a float32 copy of."""

_COLUMNS, _ROWS = "colwise", "rowwise"
_GATHERED, _EMBEDDING = "colwise_gather_output", "embedding_rowwise"
_STYLES = {_COLUMNS, _ROWS, _GATHERED, _EMBEDDING}


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Bytes of a model that trains, inside of its repeated blocks and outside of them."""

    world: int
    base: int
    base_in_blocks: int
    adapter: int
    adapter_in_blocks: int
    largest_block: int
    """Weights of the base and of the adapter in the largest one."""

    gradients: int
    adam: int
    trained: int
    """How many numbers train."""

    def part(self, size: float) -> int:
        """Return a process's share."""
        return math.ceil(size / self.world)

    def gather(self, size: float) -> int:
        """Return what a process sends if each has a share, and all get everything."""
        return math.ceil(size * (self.world - 1) / self.world)

    @property
    def everything(self) -> int:
        return self.base + self.adapter

    @property
    def outside(self) -> int:
        return self.everything - self.base_in_blocks - self.adapter_in_blocks


def per_rank(model: nn.Module, plan: Plan, weights: Mapping[str, int], world: int) -> list[PerRank]:
    """Return one record for each way to share ``plan`` among ``world`` processes.

    Args:
        model: The model.
        plan: Its plan.
        weights: Each of the base's parameters, by its name, to its bytes; tied ones once.
        world: How many processes, at least 1.
    """
    sizes = _measure(model, plan, weights, world)
    found = [_ddp(sizes), _zero2(sizes), _fsdp2(sizes), _zero3(sizes), _offloaded(sizes)]
    parallel = _tensor_parallel(model, plan, weights, sizes)
    return [*found, *([parallel] if parallel else [])]


def _measure(model: nn.Module, plan: Plan, weights: Mapping[str, int], world: int) -> _Sizes:
    blocks = {path: [0, 0] for path in _blocks(model)}
    adapters = [(item.path, item.bytes) for item in (*plan.targets, *plan.trained)]
    for index, items in enumerate((weights.items(), adapters)):
        for path, size in items:
            block = next((above for above in _above(path) if above in blocks), None)
            if block is not None:
                blocks[block][index] += size
    return _Sizes(
        world=world,
        base=plan.base_bytes,
        base_in_blocks=sum(base for base, _ in blocks.values()),
        adapter=plan.weight_bytes,
        adapter_in_blocks=sum(adapter for _, adapter in blocks.values()),
        largest_block=max((sum(both) for both in blocks.values()), default=0),
        gradients=plan.gradient_bytes,
        adam=plan.adam_bytes,
        trained=plan.parameters,
    )


def _blocks(model: nn.Module) -> Iterator[str]:
    """Yield the paths of the repeated blocks, the units in which weights are put together."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for path, module in model.named_modules():
        inside = isinstance(module, nn.ModuleList) and not names
        if type(module).__name__.removeprefix("FSDP") in names:
            yield path
        elif inside:
            yield from (f"{path}.{name}" if path else name for name in module._modules)


def _above(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _ddp(sizes: _Sizes) -> PerRank:
    return PerRank(
        strategy="DDP",
        weights=sizes.everything,
        gradients=sizes.gradients,
        optimizer=sizes.adam,
        sent=2 * sizes.gather(sizes.gradients),
        sent_in_full=2 * sizes.gather(sizes.base),
    )


def _zero2(sizes: _Sizes) -> PerRank:
    return PerRank(
        strategy="ZeRO-2",
        weights=sizes.everything,
        gradients=sizes.part(sizes.gradients),
        optimizer=sizes.part(sizes.adam + _MASTER * sizes.trained),
        # every process gets all gradients, steps its share, and hands it out
        sent=2 * sizes.gather(sizes.gradients) + sizes.gather(sizes.adapter),
        sent_in_full=3 * sizes.gather(sizes.base),
    )


def _fsdp2(sizes: _Sizes) -> PerRank:
    # blocks are put together forward and again back, the rest stays whole from one to the other
    fetched = 2 * (sizes.base_in_blocks + sizes.adapter_in_blocks) + sizes.outside
    fetched_in_full = sizes.base_in_blocks + sizes.base
    return PerRank(
        strategy="FSDP2",
        weights=sizes.part(sizes.everything),
        gathered=sizes.outside + 2 * sizes.largest_block,
        gradients=sizes.part(sizes.gradients),
        optimizer=sizes.part(sizes.adam),
        sent=sizes.gather(fetched) + sizes.gather(sizes.gradients),
        sent_in_full=sizes.gather(fetched_in_full) + sizes.gather(sizes.base),
        sent_to_save=sizes.gather(sizes.adapter),
    )


def _zero3(sizes: _Sizes) -> PerRank:
    return PerRank(
        strategy="ZeRO-3",
        weights=sizes.part(sizes.everything),
        gathered=sizes.outside + 2 * sizes.largest_block,
        gradients=sizes.part(sizes.gradients),
        optimizer=sizes.part(sizes.adam + _MASTER * sizes.trained),
        sent=sizes.gather(2 * sizes.everything) + sizes.gather(sizes.gradients),
        sent_in_full=sizes.gather(3 * sizes.base),
        sent_to_save=sizes.gather(sizes.adapter),
    )


def _offloaded(sizes: _Sizes) -> PerRank:
    fsdp = _fsdp2(sizes)
    return dataclasses.replace(
        fsdp,
        strategy="FSDP2, parts on the CPU",
        weights=0,
        gradients=0,
        optimizer=0,
        host=fsdp.weights + fsdp.gradients + fsdp.optimizer,
    )


def _tensor_parallel(
    model: nn.Module, plan: Plan, weights: Mapping[str, int], sizes: _Sizes
) -> PerRank | None:
    """Return the record for tensor parallelism as transformers does it, if the model allows it."""
    styles = _styles(model)
    known = styles and set(styles.values()) <= _STYLES and not plan.trained
    if not known or _heads(model) % sizes.world:
        return None
    kept = sum(
        sizes.part(size) if path.rpartition(".")[0] in styles else size
        for path, size in weights.items()
    )
    split = [(target, *_factor_bytes(target, styles.get(target.path))) for target in plan.targets]
    adapter = sum(sizes.part(parted) + whole for _, parted, whole in split)
    return PerRank(
        strategy="tensor parallel",
        weights=kept + adapter,
        gradients=adapter,
        optimizer=2 * adapter,
        sent=2 * sizes.gather(sum(whole for *_, whole in split)),
        sent_in_full=0,
        sent_per_token=sum(_crossing(model, styles, sizes)),
        sent_to_save=sizes.gather(sum(parted for _, parted, _ in split)),
    )


def _heads(model: nn.Module) -> int:
    """Return how many heads there are to be shared, of keys and values where those are fewer."""
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None) or 0
    return getattr(config, "num_key_value_heads", None) or heads


def _styles(model: nn.Module) -> dict[str, str]:
    """Return path to style of each module that tensor parallelism would split."""
    said: Any = getattr(model, "tp_plan", None)
    if not isinstance(said, dict):
        return {}
    patterns = {re.escape(name).replace(r"\*", r"\d+"): style for name, style in said.items()}
    found = {}
    for path, _ in model.named_modules():
        style = next((s for pattern, s in patterns.items() if re.fullmatch(pattern, path)), None)
        if style is not None:
            found[path] = style
    return found


def _factor_bytes(target: Target, style: str | None) -> tuple[int, int]:
    """Return the bytes of the factor that is split with the weight, and of the whole one."""
    size = target.slot.r * target.dtype.itemsize
    a, b = size * target.in_features, size * target.out_features
    return {_COLUMNS: (b, a), _GATHERED: (b, a), _ROWS: (a, b)}.get(style or "", (0, a + b))


def _crossing(model: nn.Module, styles: Mapping[str, str], sizes: _Sizes) -> Iterable[int]:
    """Yield the bytes that each split module sends for each token, forward and back."""
    for path, style in styles.items():
        weight = model.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        out_features, in_features = weight.shape
        item = weight.element_size()
        if style == _COLUMNS:  # its input's gradient is a sum over the processes
            yield 2 * sizes.gather(in_features * item)
        elif style == _ROWS:  # its output is
            yield 2 * sizes.gather(out_features * item)
        elif style == _EMBEDDING:
            yield 2 * sizes.gather(in_features * item)
        else:
            yield 2 * sizes.gather(in_features * item) + sizes.gather(out_features * item)


def weight_sizes(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Return name to bytes."""
    return {name: stored_bytes(tensor) for name, tensor in tensors}
