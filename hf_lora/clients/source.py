"""An adapter that is to go to a client: its files, what is known of its base, its factors."""

import dataclasses
from collections.abc import Iterator

import torch

from hf_lora.clients.base import BaseConfig
from hf_lora.files.data import LayerTensors
from hf_lora.files.read import AdapterFolder
from hf_lora.hub.card.facts import AdapterFacts, folder_facts, folder_model_facts
from hf_lora.kinds.conv import CONVOLUTION
from hf_lora.kinds.embedding import EMBEDDING
from hf_lora.kinds.lora import LOW_RANK
from hf_lora.layers.roles import Layout
from hf_lora.planning.records import some_paths


@dataclasses.dataclass(frozen=True)
class Factors:
    """The update of one layer: ``scaling · B A``."""

    path: str
    """Of the layer, as the adapter names it."""

    a: torch.Tensor
    """(R, I); of a convolution (R, I, K, ...)."""

    b: torch.Tensor
    """(O, R); of a convolution (O, R, 1, ...)."""

    scaling: float

    @property
    def r(self) -> int:
        """The rank."""
        return self.a.shape[0]

    def scaled(self, scaling: float, dtype: torch.dtype | None = None) -> "Factors":
        """Return the same update with another factor before it, and B times what that leaves out.

        B is multiplied in float32 (float64 if it is that) and rounded once; where the quotient is a
        power of two, nothing is rounded.

        Args:
            scaling: The factor.
            dtype: Type of the result, by default its own.
        """
        to = dtype or self.b.dtype
        wide = self.b.to(torch.promote_types(self.b.dtype, torch.float32))
        b = self.b if scaling == self.scaling else wide * (self.scaling / scaling)
        return Factors(self.path, self.a.to(dtype or self.a.dtype), b.to(to), scaling)

    def padded(self, r: int) -> "Factors":
        """Return the same update with a rank that is at least its own: rows and columns of zeros.

        The factor before it stays; what it means in terms of alpha does not.
        """
        if r == self.r:
            return self
        a = self.a.new_zeros((r, *self.a.shape[1:]))
        b = self.b.new_zeros((self.b.shape[0], r, *self.b.shape[2:]))
        a[: self.r], b[:, : self.r] = self.a, self.b
        return dataclasses.replace(self, a=a, b=b)


@dataclasses.dataclass(frozen=True)
class Source:
    """An adapter and what is known of its base."""

    name: str
    """As it was given, for people."""

    folder: AdapterFolder
    base: BaseConfig | None

    @property
    def facts(self) -> AdapterFacts:
        """What the adapter holds."""
        return folder_facts(self.name, self.folder)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the model's class; nothing if it is not known."""
        if self.base is not None and self.base.classes:
            return self.base.classes
        return folder_model_facts(self.folder).classes

    def of_layout(self, *layouts: Layout) -> list[str]:
        """Return the paths of the layers whose factors are of one of some kinds."""
        return [
            path
            for path, held in self.folder.factors.items()
            if any(held.layout is one for one in layouts) and not _of_attention(held)
        ]

    def layers(self) -> Iterator[Factors]:
        """Yield each layer that has two factors and nothing else, read when it is asked for."""
        for path in self.of_layout(LOW_RANK, EMBEDDING, CONVOLUTION):
            held, slot = self.folder.factors[path], self.folder.slots[path]
            tensors = dict(self.folder.file.read(held.keys.values()))
            a, b = (tensors[held.keys[role]] for role in held.layout.roles)
            yield Factors(path, a, b, slot.scaling)


def _of_attention(held: LayerTensors) -> bool:
    """Say whether factors are of an ``nn.MultiheadAttention``, which has two pairs."""
    return any(".base_layer.out_proj." in key for key in held.keys.values())


def only_factors(source: Source, *layouts: Layout) -> list[str]:
    """Return a line for each thing that a client which knows factors alone has no place for.

    Args:
        source: The adapter.
        layouts: The kinds of layers that it knows.
    """
    facts = source.facts
    known = {*source.of_layout(*layouts)}
    other = [path for path in source.folder.factors if path not in known]
    slots = source.folder.slots.items()
    biased = [path for path, slot in slots if slot.bias or slot.lora_bias]
    found = {
        "it has no place for updates of": other,
        "it has no place for modules trained in full, here": facts.trained,
        "it has no place for buffers that the training moved, here": facts.buffers,
        "it has no place for biases, here of": [*biased, *facts.biases],
        "it has no place for trained rows of embeddings, here": facts.rows,
    }
    faults = [f"{words} {some_paths(list(paths))}" for words, paths in found.items() if paths]
    return faults if source.folder.factors else [*faults, "there is no adapted layer"]
