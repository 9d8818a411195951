"""Where PEFT reads names of layers as names of experts, because transformers 4 had those there."""

from collections.abc import Iterable

from torch import nn

from hf_lora.compat.libraries import is_pretrained
from hf_lora.compat.transformers import way_to_stack_experts

# What PEFT 0.21 turns into stacked parameters, for each way of transformers 5 to stack experts:
# every name that ends so, also that of a dense layer or a shared expert, whose factors are dropped.
_TAKEN = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}


def taken_for_experts(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return those of the layers that PEFT would not find under their names, in order."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not is_pretrained(model) or not isinstance(kind, str):
        return []
    stacked = "mixtral" if kind == "mixtral" else way_to_stack_experts(kind)
    names = _TAKEN.get(stacked or "", set())
    return [path for path in paths if path.rsplit(".", 1)[-1] in names]
