"""Which biases of a base train beside an adapter's layers, where all of them shall."""

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from hf_lora.layers.biases import own_bias_fault
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.roles import OWN_BIAS
from hf_lora.planning.ties import Owners
from hf_lora.targets import inside


def has_bias(module: nn.Module) -> bool:
    """Say whether a module has a bias of its own."""
    return parameter_of(module, OWN_BIAS) is not None


def other_biases(
    modules: Mapping[str, nn.Module],
    adapted: Collection[str],
    trained: Collection[str],
    owners: Owners,
) -> list[str]:
    """Return the paths of the modules, of no adapted layer, whose own bias trains.

    A head keeps the bias of the layer in it as its own, too (BERT's ``predictions``): it trains in
    that layer.

    Args:
        modules: Path to module.
        adapted: Paths of the layers whose own biases train.
        trained: Paths of the modules that are trained in full.
        owners: Which modules share which parameters.
    """
    return [
        path
        for path, module in modules.items()
        if has_bias(module)
        and path not in adapted
        and not inside(path, trained)
        and not kept_for(path, owners)
    ]


def kept_for(path: str, owners: Owners) -> str | None:
    """Return the path of the layer below a module whose bias the module keeps, too; or None."""
    others = owners.others([(path, OWN_BIAS)], "")
    return next((other for other in others if inside(other, (path,)) and other != path), None)


def bias_faults(
    modules: Mapping[str, nn.Module],
    paths: Collection[str],
    owners: Owners,
    taken: Collection[str],
) -> Iterator[str]:
    """Yield a line for each module whose own bias is to train and cannot.

    Args:
        modules: Path to module.
        paths: Those of which it is.
        owners: Which modules share which parameters.
        taken: Paths of the layers to which other adapters give low-rank updates.
    """
    for path in paths:
        shared = [p for p in owners.others([(path, OWN_BIAS)], "") if not inside(path, (p,))]
        fault = own_bias_fault(modules[path])
        if not path:
            fault = "it belongs to the model itself"
        elif path in taken:
            fault = "another adapter has a low-rank update there, and not its bias"
        elif shared:
            fault = f"it is shared with {', '.join(shared)}"
        if fault:
            yield f"the bias of {path or 'the model itself'} cannot be trained: {fault}"
