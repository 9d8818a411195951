"""A Parameter of the base that somebody unfroze, and that an adapter has since."""

import dataclasses

from torch import nn

from hf_lora.layers.kind import Patched


@dataclasses.dataclass
class Adopted:
    """A Parameter of the base that became an adapter's copy; the base has its values in another."""

    adapter: str
    module: Patched
    role: str
    parameter: nn.Parameter

    def give_back(self) -> None:
        """Put the Parameter where it was, with the values that the base has."""
        kept = self.module._parameters[self.role]
        if kept is not self.parameter and kept is not None:
            self.parameter.data = kept.data
            self.parameter.requires_grad = False
            self.module._parameters[self.role] = self.parameter
