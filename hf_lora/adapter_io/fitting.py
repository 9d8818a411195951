"""Whether the tensors that a file has of a layer are for the module that stands in its place."""

from torch import nn

from hf_lora.files.data import LayerTensors
from hf_lora.kinds.table import host_fault, kind_of


def factor_fault(module: nn.Module | None, factors: LayerTensors) -> str | None:
    """Return why tensors are not for a module, or None."""
    if module is None:
        return "the model has no such module"
    kind, fault = kind_of(module), host_fault(module)
    if fault or kind is None:
        return fault
    if not factors.may_be(kind.lora_layout):
        return (
            f"the adapter has {', '.join(factors.keys)} there, which are for another kind of layer"
        )
    shapes = factors.shapes
    own = {role: shape for role, shape in shapes.items() if role in kind.lora_layout.roles}
    return kind.lora_fit_fault(module, own) or kind.lora_bias_fit_fault(module, shapes)
