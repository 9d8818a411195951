"""Which adapters speak: one object that all layers of a model read, so that a switch is O(1)."""

import torch

from hf_lora.layers.sharing import Sharing


class Routing:
    """The state that all layers of one model share.

    One for the model, not one for each thread: whoever switches in one thread switches for all.
    """

    def __init__(self, active: tuple[str, ...] = (), merged: tuple[str, ...] = ()):
        self._active = active
        self._merged = merged
        self.gates: dict[str, torch.Tensor] = {}
        """What compiled inference reads instead of names, so that a switch compiles nothing."""

        self.starts: dict[str, str] = {}
        """How each adapter's factors are drawn, should they have to be drawn anew."""

        self.plain = False
        """Whether every layer takes the plain path: the oracle of the fused one."""

        self.sharing = Sharing()
        """Which layers read the same tensor and are computed together."""

    @property
    def active(self) -> tuple[str, ...]:
        """Adapters whose updates are added, in order."""
        return self._active

    @active.setter
    def active(self, names: tuple[str, ...]) -> None:
        self._active = names
        self._set_gates()

    @property
    def merged(self) -> tuple[str, ...]:
        """Adapters that are inside the weights now; their updates are not added a second time."""
        return self._merged

    @merged.setter
    def merged(self, names: tuple[str, ...]) -> None:
        self._merged = names
        self._set_gates()

    def add_gate(self, name: str) -> None:
        """Have a gate for an adapter that layers are about to get."""
        if name not in self.gates:
            with torch.inference_mode(False):
                self.gates[name] = torch.zeros((), dtype=torch.bool)
            self._set_gates()

    def _set_gates(self) -> None:
        for name, gate in self.gates.items():
            gate.fill_(name in self._active and name not in self._merged)
