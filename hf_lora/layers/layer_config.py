"""The numbers of one adapter on one layer."""

import dataclasses

from hf_lora.functional.low_rank import scaling


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One adapter's numbers on one layer."""

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    lora_bias: bool = False
    """Whether B has a bias."""

    bias: bool = False
    """Whether the layer's own bias trains."""

    parts: tuple[str, ...] = ()
    """Which of the module's parameters are adapted, where it has several; else none is named."""

    @property
    def scaling(self) -> float:
        """The factor s of ``s · B A``."""
        return scaling(self.r, self.alpha, self.rslora)
