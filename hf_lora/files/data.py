"""What an adapter folder holds, as one record that does not know any model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from hf_lora.config import LoRAConfig
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.roles import OWN_BIAS, Layout, Shapes
from hf_lora.layers.token_rows import TokenRows

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class LayerTensors:
    """The tensors of one layer in a file."""

    layout: Layout
    keys: dict[str, str]
    """Role to the name in the file."""

    shapes: Shapes

    @property
    def rank(self) -> int | None:
        """Their rank, if they tell."""
        return self.layout.rank(self.shapes)

    def may_be(self, layout: Layout) -> bool:
        """Say whether they are of a layout: several may call theirs by the same names."""
        if layout is self.layout:
            return True
        factors = set(self.shapes) - {*self.layout.beside, OWN_BIAS}
        same = set(layout.roles) == factors and layout.fault(self.shapes) is None
        return same and layout.rank(self.shapes) == self.rank


@dataclasses.dataclass(frozen=True)
class AdapterData:
    """Everything that is written for one adapter.

    Paths are those of the model itself, without what torch.compile or FSDP put into them.
    """

    config: LoRAConfig
    slots: dict[str, LayerConfig]
    """Path of each adapted layer to its numbers."""

    trained: tuple[str, ...]
    """Paths of the modules trained in full."""

    tensors: dict[str, torch.Tensor]
    """Key in PEFT's notation to tensor."""

    target_names: list[str] | str
    """Literal names, or one pattern, that for PEFT mean exactly the other adapted layers."""

    by_weight: list[str]
    """Paths of adapted layers that PEFT finds by the name of their weight only."""

    trained_names: list[str]
    """Names of the modules trained in full, and of those that are tied with them. PEFT compares
    ends of text, so they may mean others as well; then ``tensors`` has the base's own of those."""

    base: str | None
    """Hub id or path of the base model, if it has one."""

    revision: str | None
    task: str | None
    """PEFT's word for what the model does, if it has one."""

    auto_mapping: dict[str, str] | None
    """Its class and where that is, in PEFT's notation, where there is no such word."""

    fan_in_fan_out: bool
    fingerprint: dict[str, Any] | None

    buffers: tuple[str, ...] = ()
    """Names of the buffers of the base that the training has moved, and that ``tensors`` holds."""

    base_changed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What makes the base another than the one that is named; see ``adapter_io.base_on_disk``."""

    labels: dict[str, Any] | None = None
    """The names of a classifier's labels; see ``files.labels``."""

    ties: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of a tensor to that of another, where the adapter has one for both. The file holds it
    under each name."""

    rows: Mapping[str, TokenRows] = dataclasses.field(default_factory=dict)
    """Path of each module of which some rows are trained, to these."""

    row_names: tuple[str, ...] = ()
    """Those of these paths for which PEFT reads rows; what it ties by itself is left out."""

    pefts_tie: bool = False
    """Whether PEFT, if asked, ties the same; if not, it reads a tensor for each module."""
