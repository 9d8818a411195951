"""Which layers of a model make up its output head, found by their places and their widths."""

from torch import nn

from hf_lora.layers.hosts import features

_INPUTS = ("in_channels", "input_size", "embed_dim")
"""What modules call the width of their input that are no linear layers."""


def output_head(model: nn.Module) -> set[str]:
    """Return the paths of the layers whose output is the model's own.

    Those are the output embedding, and of what lies beside the backbone of a transformers model the
    layers after which nothing comes there that could take what they make: a transform before the
    last layer of a head is none.
    """
    embedding = _output_embedding(model)
    outside = beside_backbone(model)
    head = {path for path, module in model.named_modules() if module is embedding}
    wanted: set[int] = set()
    for path, module in reversed(outside.items()):
        sizes = features(module)
        if sizes is not None and sizes[1] not in wanted:
            head.add(path)
        wanted |= _input_widths(module)
    return head


def beside_backbone(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that lie beside the backbone of a transformers model, by path, in order.

    Of any other model there are none.
    """
    backbone = getattr(model, "base_model", model)
    prefix = getattr(model, "base_model_prefix", "")
    if not isinstance(backbone, nn.Module) or backbone is model or not prefix:
        return {}
    return {
        path: module
        for path, module in model.named_modules()
        if path and path != prefix and not path.startswith(f"{prefix}.")
    }


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def _input_widths(module: nn.Module) -> set[int]:
    sizes = features(module)
    if sizes is not None:
        return {sizes[0]}
    found = (getattr(module, name, None) for name in _INPUTS)
    return {width for width in found if isinstance(width, int)}
