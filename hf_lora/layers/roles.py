"""The tensors that an adapter has on a module, as everybody but the module's own class sees them.

A class that patches modules says which there are: what they are called in the model and in a file,
their shapes, and how they train. Whatever works on whole models goes by that, and knows no more.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hf_lora.functional.low_rank import Product
from hf_lora.layers.layer_config import LayerConfig

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""Role to shape."""

Place = tuple[str, str]
"""Path of a module, and the role of a tensor there."""

Ties = Mapping[Place, Place]
"""Each place at which an adapter's copy of another is read, to that one."""


class Group(NamedTuple):
    """A parameter group for an optimizer."""

    order: int
    """Its place among the groups."""

    name: str
    fast: bool = False
    """Whether LoRA+ lets it learn faster than the others."""

    decays: bool = True
    """Whether weight decay is for it, as it is for matrices."""


FACTOR_A = Group(0, "lora_A")
FACTOR_B = Group(1, "lora_B", fast=True)
IN_FULL = Group(2, "trained")
IN_FULL_VECTORS = Group(3, "trained_no_decay", decays=False)
BIAS_OF_B = Group(4, "lora_bias", fast=True, decays=False)

BESIDE = "../"
"""At the beginning of a key: it is below the path of the module above."""

OWN_BIAS = "bias"
"""The role of an adapter's copy of a layer's own bias, and what that is called there."""


class Role(NamedTuple):
    """One tensor that an adapter has on a module."""

    name: str
    """What it is there: ``lora_A``; of a module trained in full, the name of its own tensor."""

    held: str
    """The name under which the module holds it: ``lora_A_fr`` of an adapter ``fr``."""

    shape: Shape
    """Of all of it, wherever its parts are."""

    key: str
    """What it is called in a file, below the module's path."""

    group: Group


@dataclasses.dataclass(frozen=True)
class Layout:
    """How files hold the tensors of one kind of update on one layer."""

    roles: tuple[str, ...]
    """What they are called below the layer's path, with or without ``.weight`` after it."""

    fault: Callable[[Shapes], str | None]
    """Why tensors of these shapes are no update together, or None."""

    rank: Callable[[Shapes], int | None]
    """The rank that tensors of these shapes have; None if they do not tell."""

    norm: Callable[[Mapping[str, Any], LayerConfig], float]
    """The Frobenius norm of what they change, from the tensors themselves."""

    ending: str = ".weight"
    """What follows a role in the name of a tensor in a file."""

    beside: tuple[str, ...] = ()
    """Roles that a layer may have besides, or not."""

    widths: Callable[[Shapes], tuple[int, int]] | None = None
    """What a layer reads and gives for each row, (in, out), if that is what it does."""

    split: Callable[[Mapping[str, Any], LayerConfig], dict[str, Product]] | None = None
    """The factors as the tensors have them, without s: part of the module to a product of which s
    times is its update; None where an update is none. All parts of a module have one rank."""

    join: Callable[[Mapping[str, Product], Shapes], dict[str, Any]] | None = None
    """The tensors that :attr:`split` gives these products of, whatever their rank; the shapes are
    those of tensors of any rank of the same module, and tell its kernel and its groups."""

    def sizes(self, shapes: Shapes) -> str:
        """Return for people what a layer turns into what: ``"64 -> 128"``."""
        if self.widths is not None:
            return "{} -> {}".format(*self.widths(shapes))
        factors = (shapes[role] for role in self.roles if role in shapes)
        return ", ".join(" x ".join(map(str, shape)) for shape in factors)

    def key(self, role: str) -> str:
        """Return the end of a tensor's name in a file that we write."""
        return f"{role}{self.ending}"
