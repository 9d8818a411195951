"""A model's base tensors, read for its fingerprint: wrapped, merged or quantized as it may be."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.compat.accelerate import is_on_meta, present
from hf_lora.compat.deepspeed import shape_of
from hf_lora.compat.dtensor import gather_values, is_distributed
from hf_lora.compat.offload_stores import entry_of
from hf_lora.compat.quantized_layers import is_known
from hf_lora.files.keys import without_wrappers
from hf_lora.layers.hosts import features, has_float_weight
from hf_lora.layers.quantized import float_values
from hf_lora.layers.quantized import shape_of as packed_shape
from hf_lora.layers.replaced import Replaced
from hf_lora.layers.roles import OWN_BIAS
from hf_lora.layers.trained import own_tensors, tensor_names
from hf_lora.model.registry import find


@dataclasses.dataclass(frozen=True)
class BaseTensor:
    """A parameter or buffer of the base, which may stand elsewhere for the moment."""

    path: str
    """Of its module, without what torch.compile or FSDP put into it."""

    role: str
    module: nn.Module
    shape: tuple[int, ...]
    """Of the numbers that it stands for, however they are packed."""

    quantized: bool
    original: Replaced | None
    """What stood on the module before a merge."""

    def tensor(self) -> torch.Tensor:
        """Return what stands on the module, past any adapter's copy and any merge.

        Of a tensor that accelerate keeps elsewhere it is a place without numbers.
        """
        before = None if self.original is None else self.original.tensors.get(self.role)
        if before is not None:
            return before
        names = tensor_names(self.module)
        # what packs a weight has other names: any of them says where it is
        role = self.role if self.role in (*names, *vars(self.module)) else names[0]
        return dict(own_tensors(self.module, (role,)))[role]


class BaseTensors:
    """All floating-point or quantized tensors of a model's base, by name; tied ones once.

    Args:
        model: The model.
        together: Whether every process takes part, so that tensors in parts can be read.
    """

    def __init__(self, model: nn.Module, *, together: bool = False):
        self._together = together
        self.tensors: dict[str, BaseTensor] = {}
        self.ties: dict[str, str] = {}
        """Name of a tensor to the name of the same one in ``tensors``."""

        self.vocabulary = vocabulary(model)
        found = find(model)
        originals = {id(each.module): each for each in found[1].originals} if found else {}
        first: dict[int, str] = {}
        for path, module in model.named_modules():
            plain = without_wrappers(path)
            for held in _held(plain, module, originals.get(id(module))):
                name = f"{plain}.{held.role}" if plain else held.role
                same = first.setdefault(id(held.tensor()), name)
                if same == name:
                    self.tensors[name] = held
                else:
                    self.ties[name] = same

    def named(self) -> Iterator[tuple[str, BaseTensor]]:
        """Yield each tensor under all its names."""
        yield from self.tensors.items()
        yield from ((name, self.tensors[to]) for name, to in self.ties.items())

    def find(self, name: str) -> BaseTensor | None:
        """Return the tensor of this name, tied or not."""
        return self.tensors.get(self.ties.get(name, name))

    def on_meta(self, names: Mapping[str, Any]) -> list[str]:
        """Return the paths of the modules that have no data, and that nobody will bring."""
        modules = {t.path: t.module for name in names if (t := self.find(name)) is not None}
        return [path for path, module in modules.items() if is_on_meta(module)]

    def read(self, at: Mapping[str, range]) -> dict[str, torch.Tensor]:
        """Return the numbers at some positions of each flattened tensor, float32 on the CPU.

        Those that cannot be read are left out: not loaded yet, packed in an unknown way, or in
        parts while this process is alone.
        """
        wanted: dict[str, tuple[torch.Tensor, range]] = {}
        for name, positions in at.items():
            found = self.find(name)
            source = _source(found, positions) if found and self._is_there(found) else None
            if source is not None:
                wanted[name] = source
        return dict(zip(wanted, gather_values(list(wanted.values())), strict=True))

    def _is_there(self, held: BaseTensor) -> bool:
        tensor = held.tensor()
        # FSDP1 leaves flat parts of many weights in their places
        alone = (is_distributed(tensor) and not self._together) or hasattr(
            tensor, "_fsdp_flattened"
        )
        if alone or is_on_meta(held.module):
            return False
        sizes = features(held.module)
        whole = held.role != "weight" or sizes is None or sorted(sizes) == sorted(held.shape)
        return whole


def _held(path: str, module: nn.Module, original: Replaced | None) -> Iterator[BaseTensor]:
    plain, linear = has_float_weight(module), features(module) is not None
    sizes = features(module) if is_known(module) else None
    if sizes is not None:
        yield BaseTensor(path, "weight", module, sizes[::-1], True, original)
        bias = getattr(module, OWN_BIAS, None)
        if isinstance(bias, torch.Tensor):
            yield BaseTensor(path, OWN_BIAS, module, _shape(bias), False, original)
        return
    for role, tensor in own_tensors(module, tensor_names(module)):
        if is_lazy(tensor) or not (tensor.is_floating_point() or isinstance(tensor, nn.Parameter)):
            continue
        packed = not _is_plain(tensor) or (role == "weight" and linear and not plain)
        yield BaseTensor(path, role, module, _shape(tensor), packed, original)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor holds the numbers that it stands for."""
    known = type(tensor) in (torch.Tensor, nn.Parameter) or is_distributed(tensor)
    return known and tensor.is_floating_point() and tensor.dtype.itemsize >= 2


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return packed_shape(tensor) or tuple(shape_of(tensor))


def _source(held: BaseTensor, at: range) -> tuple[torch.Tensor, range] | None:
    """Return from where to pick these numbers, or None if they cannot be read."""
    tensor = held.tensor()
    if held.quantized:
        with present(held.module):
            values = float_values(held.module, at, held.role)
        return None if values is None else (values, range(len(values)))
    if not tensor.is_meta:
        return tensor, at
    # not the whole model at once: what is fetched now is let go of before the next
    entry = None if held.original is None else held.original.entries.get(held.role)
    entry = entry or entry_of(held.module, held.role)
    if entry is not None:  # nor is a weight moved to a device for some numbers of it
        (values,) = gather_values([(entry.read(), at)])
    else:
        with present(held.module):
            (values,) = gather_values([(held.tensor(), at)])
    return values, range(len(values))


def vocabulary(model: nn.Module) -> int | None:
    """Return how many tokens the input embeddings have, if the model says which those are."""
    getter = getattr(model, "get_input_embeddings", None)
    if not callable(getter):
        return None
    try:
        embeddings = getter()
    except (NotImplementedError, AttributeError):  # transformers raises where it knows of none
        return None
    weight = getattr(embeddings, "_parameters", {}).get("weight")
    shape = () if weight is None or is_lazy(weight) else shape_of(weight)
    return shape[0] if len(shape) == 2 else None
