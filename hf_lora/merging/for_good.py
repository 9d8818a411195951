"""Merging for good without a second copy: each weight is let go as soon as its merged one is there.

Whatever can fail is done before, while the base is as it was. After the first weight there is no
way back, so what interrupts then waits until the last.
"""

import dataclasses

import torch
from torch import nn

from hf_lora.functional.low_rank import Product, plus_products, surely_fits
from hf_lora.layers.choice import Weights
from hf_lora.layers.kind import Patched
from hf_lora.layers.replaced import Replaced, in_place_of
from hf_lora.merging.untying import untie


@dataclasses.dataclass
class _Weight:
    """A weight that is still the base's, and what it will be with."""

    module: nn.Module
    name: str
    updates: list[Product]
    old: nn.Parameter | None

    def merge(self) -> None:
        """Exchange it, unless that is done."""
        old = self.old
        # also where what interrupted came between the exchange and the last line
        if old is not None and self.module._parameters[self.name] is old:
            merged = plus_products(old.detach(), self.updates).to(old.dtype)
            self.module._parameters[self.name] = in_place_of(old, merged)
        self.old = None


class Later:
    """What is left of a merge for good when nothing can fail any more."""

    def __init__(self) -> None:
        self._weights: list[_Weight] = []

    def take(self, layer: Patched, merged: Weights, replaced: Replaced | None) -> bool:
        """Take over a layer's weights, if their merged ones can be made at the end and will do.

        Args:
            layer: The layer.
            merged: All that shall be inside, with their factors.
            replaced: What stood in the layer before, if some adapters are inside already.
        """
        updates = layer.lora_products_to_come(merged, replaced)
        if updates is None:
            return False
        found = [
            _Weight(layer, name, each, layer._parameters[name]) for name, each in updates.items()
        ]
        if not all(each.old is not None and surely_fits(each.old, each.updates) for each in found):
            return False  # whether it does is seen by making it
        self._weights += found
        return True

    def check_room(self) -> None:
        """Fail here, with the model as it was, where memory has no room for one more weight."""
        largest: dict[torch.device, nn.Parameter] = {}
        for old in (each.old for each in self._weights):
            if old is not None and old.nbytes > getattr(largest.get(old.device), "nbytes", 0):
                largest[old.device] = old
        for old in largest.values():
            # beside it stand a block of the sum, and the factors
            torch.empty(2 * old.nbytes, dtype=torch.uint8, device=old.device)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Merge what is left; to be done again where something interrupted it."""
        for each in self._weights:
            each.merge()
        untie(model, {id(each.module) for each in self._weights})
