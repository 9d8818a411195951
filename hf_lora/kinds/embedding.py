"""LoRA on ``nn.Embedding``: each row gets its A, R numbers wide, times B.

Legend: V rows, D width, R rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_lora.functional.low_rank import Product, product, update_norm
from hf_lora.functional.token_rows import as_scale
from hf_lora.layers.factors import Factored
from hf_lora.layers.hosts import has_float_weight, taken_names
from hf_lora.layers.instance_forward import has_foreign_forward
from hf_lora.layers.kind import Patched
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import DEFAULT
from hf_lora.layers.probe import host_class
from hf_lora.layers.roles import Layout, Shapes
from hf_lora.layers.tensor_parallel import to_local

A, B = "lora_embedding_A", "lora_embedding_B"


def _fault(shapes: Shapes) -> str | None:
    a, b = shapes[A], shapes[B]
    if not len(a) == len(b) == 2 or a[0] != b[1] or 0 in (*a, *b):
        return f"has {A} {a} and {B} {b}, which do not fit together"
    return None


def _norm(tensors: Mapping[str, torch.Tensor], config: LayerConfig) -> float:
    return update_norm(tensors[A], tensors[B], config.scaling)


def _split(tensors: Mapping[str, torch.Tensor], config: LayerConfig) -> dict[str, Product]:
    return {"weight": Product(tensors[B][None], tensors[A][None])}


def _join(products: Mapping[str, Product], shapes: Shapes) -> dict[str, torch.Tensor]:
    left, right = products["weight"]
    return {A: right[0], B: left[0]}


EMBEDDING = Layout(
    roles=(A, B),
    fault=_fault,
    rank=lambda shapes: shapes[A][0],
    norm=_norm,
    ending="",
    widths=lambda shapes: (shapes[A][1], shapes[B][0]),
    split=_split,
    join=_join,
)
"""A (R, V) and B (D, R) of an embedding, as PEFT has them."""


@torch.no_grad()
def _scales(kind: type[nn.Embedding], host: nn.Embedding) -> bool:
    """Say whether a host's own forward looks rows up and multiplies them, as Gemma's does."""
    scale, weight = getattr(host, "embed_scale", None), host._parameters["weight"]
    if scale is None or weight is None:
        return False
    if weight.is_meta:
        return True
    ids = torch.arange(min(4, len(weight)), device=weight.device)
    try:
        rows = kind.forward(host, ids)
    except Exception:  # it wants something else than ids
        return False
    wanted = weight[ids] * as_scale(scale, weight)
    return rows.shape == wanted.shape and torch.equal(rows, wanted)


def embedding_fault(host: nn.Embedding, added: Sequence[str]) -> str | None:
    """Return why an embedding cannot be given tensors that change what it looks up, or None.

    Args:
        host: The embedding, patched or not.
        added: What the tensors would be called.
    """
    name = type(host).__name__
    if host.max_norm is not None:
        return f"this {name} renormalizes its rows in place (max_norm), which moves the base"
    if host.sparse:
        return f"the gradients of this {name} are sparse, which those of an adapter are not"
    kind: Any = host_class(host)
    if kind.forward is not nn.Embedding.forward and not _scales(kind, host):
        return f"{name} has a forward of its own, which may do more than look rows up"
    if not isinstance(host, Patched) and not has_float_weight(host):
        return f"the weight of this {name} is not there yet, or packed or quantized"
    if has_foreign_forward(host):
        return f"the forward of this {name} was replaced on the instance, which would hide LoRA"
    if not isinstance(host, Patched) and taken_names(host, DEFAULT, added):
        return f"{name} has a {added[0]} already: another library's adapter is on it"
    return None


class LoRAEmbedding(Factored):
    """Mixin that adds low-rank updates to an embedding: ``y += s · A[:, ids]ᵀ Bᵀ``.

    Only the rows that are looked up are computed with, and get a gradient. What the host does to
    its rows (Gemma's scaling) is done to the update as well. There is no dropout: a row that is
    looked up is all that there is of it.
    """

    lora_layout = EMBEDDING
    lora_zero = 0
    weight: Any

    @classmethod
    def lora_takes(cls, host: nn.Module) -> bool:
        """Say whether a module is an embedding."""
        return isinstance(host, nn.Embedding)

    @classmethod
    def lora_fault(cls, host: nn.Module) -> str | None:
        """Return why an embedding cannot be adapted, or None."""
        assert isinstance(host, nn.Embedding)
        return embedding_fault(host, (A, B))

    @classmethod
    def lora_rank_fault(cls, host: nn.Module, r: int) -> str | None:
        """Return what is wrong with a rank: it is at most the smaller side."""
        assert isinstance(host, nn.Embedding)
        most = min(host.num_embeddings, host.embedding_dim)
        return f"r={r} is larger than the embedding's smaller side, {most}" if r > most else None

    @classmethod
    def lora_shapes(cls, host: nn.Module, config: LayerConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        assert isinstance(host, nn.Embedding)
        return {A: (config.r, host.num_embeddings), B: (host.embedding_dim, config.r)}

    @classmethod
    def lora_fit_fault(cls, host: nn.Module, shapes: Shapes) -> str | None:
        """Return how the sizes differ, or None."""
        assert isinstance(host, nn.Embedding)
        given, here = (shapes[A][1], shapes[B][0]), (host.num_embeddings, host.embedding_dim)
        if given != here:
            return f"the adapter is for {given[0]} rows of {given[1]}, the embedding has {here}"
        return None

    @classmethod
    def lora_init(cls, factors: Sequence[torch.Tensor], method: str) -> None:
        """Fill A with zeros and B with normal numbers, whatever the method, as PEFT does."""
        with torch.no_grad():
            factors[0].zero_()
            factors[1].normal_()

    @classmethod
    def lora_products(
        cls, host: nn.Module, config: LayerConfig, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Product]:
        """Return the update of the weight, (V, D)."""
        return {"weight": product(tensors[A], tensors[B], config.scaling, turned=True)}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the host's rows plus every active adapter's update of them."""
        y = super().forward(input)
        for name, factor in self.lora_routing.now().live:
            config = self.lora_slots.get(name)
            if config is not None:
                update = self._update(input, name, config.scaling * factor)
                y = y + update.to(y.device, y.dtype)
        return y

    def _update(self, ids: torch.Tensor, name: str, s: float) -> torch.Tensor:
        a_RV, b_DR = (to_local(factor) for factor in self.lora_pair(name))
        host: Any = self
        h = F.embedding(ids, a_RV.t(), host.padding_idx) * s
        scale = getattr(host, "embed_scale", None)  # transformers' scaled embeddings
        h = h if scale is None else h * as_scale(scale, h)
        return F.linear(h, b_DR)


LoRAEmbedding.lora_mixin = LoRAEmbedding
