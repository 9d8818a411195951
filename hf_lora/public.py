"""The public names, all of them; ``hf_lora`` itself hands them out when the first is asked for."""

from hf_lora.adapter_io.save import save
from hf_lora.algebra.combine import combine, resize, subtract
from hf_lora.algebra.diff import Diff, diff
from hf_lora.algebra.extract import extract
from hf_lora.algebra.record import DerivedAdapter
from hf_lora.algebra.similarity import Similarity, similarity
from hf_lora.api import apply_lora, from_pretrained, load, plan, push_to_hub, unwrap, wrap
from hf_lora.auto_classes import disable_auto, enable_auto
from hf_lora.clients.export import export, servable
from hf_lora.clients.records import Exported, Servable
from hf_lora.config import LoRAConfig
from hf_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BaseLoadError,
    BaseMismatchError,
    ConfigError,
    GradientError,
    HfLoRAError,
    HfLoRAWarning,
    HubError,
    SaveError,
    StateError,
    TargetError,
    UnknownAdapterError,
    UnsupportedAdapterError,
)
from hf_lora.file_merging.merge import merge_checkpoint
from hf_lora.file_merging.report import MergeReport
from hf_lora.integrations.accelerate_state import register
from hf_lora.integrations.base_view import base_view
from hf_lora.integrations.merged import merge_and_unwrap
from hf_lora.integrations.quantize_experts import dequantize_experts, quantize_experts
from hf_lora.integrations.trainer.mixin import LoRATrainerMixin
from hf_lora.kinds.linear import LoRALinear
from hf_lora.kinds.lora import LoRALayer
from hf_lora.layers.registered import register_layer
from hf_lora.merging.in_memory import merge, unmerge
from hf_lora.model.adapters import adapters, add_adapter, delete_adapter, freeze, unfreeze
from hf_lora.model.choices import activate, active_adapters, no_adapter, use_adapter
from hf_lora.model.optimizer import optimizer_groups
from hf_lora.model.summary import Summary, summary
from hf_lora.peft_names import hint as hint
from hf_lora.planning.records import Plan
from hf_lora.recipes.record import Trained
from hf_lora.recipes.train import train
from hf_lora.version import __version__

__all__ = [
    "AdapterFileError",
    "AdapterMismatchError",
    "BaseLoadError",
    "BaseMismatchError",
    "ConfigError",
    "DerivedAdapter",
    "Diff",
    "Exported",
    "GradientError",
    "HfLoRAError",
    "HfLoRAWarning",
    "HubError",
    "LoRAConfig",
    "LoRALayer",
    "LoRALinear",
    "LoRATrainerMixin",
    "MergeReport",
    "Plan",
    "SaveError",
    "Servable",
    "Similarity",
    "StateError",
    "Summary",
    "TargetError",
    "Trained",
    "UnknownAdapterError",
    "UnsupportedAdapterError",
    "__version__",
    "activate",
    "active_adapters",
    "adapters",
    "add_adapter",
    "apply_lora",
    "base_view",
    "combine",
    "delete_adapter",
    "dequantize_experts",
    "diff",
    "disable_auto",
    "enable_auto",
    "export",
    "extract",
    "freeze",
    "from_pretrained",
    "load",
    "merge",
    "merge_and_unwrap",
    "merge_checkpoint",
    "no_adapter",
    "optimizer_groups",
    "plan",
    "push_to_hub",
    "quantize_experts",
    "register",
    "register_layer",
    "resize",
    "save",
    "servable",
    "similarity",
    "subtract",
    "summary",
    "train",
    "unfreeze",
    "unmerge",
    "unwrap",
    "use_adapter",
    "wrap",
]
