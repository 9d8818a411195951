"""What is known of one adapter on a model, beside its tensors, which the modules have."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hf_lora.config import LoRAConfig
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.roles import Ties
from hf_lora.layers.token_rows import TokenRows


@dataclasses.dataclass
class Adapter:
    """One adapter on a model."""

    name: str
    config: LoRAConfig
    slots: dict[str, LayerConfig]
    """Path of each adapted layer to its numbers, in the model's order."""

    trained: tuple[str, ...]
    """Paths of the modules that are trained in full, each with everything below it."""

    ties: Ties = dataclasses.field(default_factory=dict)
    """What is read as the copy of a tensor elsewhere, to where the adapter has that."""

    biases: tuple[str, ...] = ()
    """Paths of modules of no layer, of which the bias alone is trained."""

    rows: Mapping[str, TokenRows] = dataclasses.field(default_factory=dict)
    """Path of each module of which some rows are trained, to these."""

    places: dict[str, None] = dataclasses.field(default_factory=dict)
    """Paths of all modules that it has something on: the layers, then those below ``trained``."""

    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the file that it was loaded from says of base, task and class, to be saved again."""

    training: Any = None
    """What is known of its last training here, for the model card."""
