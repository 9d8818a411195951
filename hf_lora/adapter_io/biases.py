"""Where the biases of a base that an adapter's file has go in a model."""

from collections.abc import Collection, Mapping

from torch import nn

from hf_lora.adapter_io.ties import difference
from hf_lora.files.biases import trains_biases
from hf_lora.files.read import AdapterFolder
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.roles import OWN_BIAS, Place
from hf_lora.planning.biases import bias_faults, has_bias, kept_for
from hf_lora.planning.ties import Owners
from hf_lora.targets import inside


def match_biases(
    folder: AdapterFolder,
    model: nn.Module,
    slots: Mapping[str, LayerConfig],
    tops: Collection[str],
    others: Mapping[Place, str],
    keys: Mapping[Place, str],
    problems: list[str],
    *,
    may_lack: bool,
) -> tuple[dict[Place, str], set[Place]]:
    """Match the biases that trained in modules of no adapted layer.

    Args:
        folder: The adapter.
        model: The model.
        slots: Path of each adapted layer to its numbers.
        tops: Paths of the modules that are trained in full.
        others: Place to key of what is neither a factor nor part of one of these.
        keys: Place to key of the adapted layers' tensors.
        problems: Gets a line for each bias that has no place, or no tensor.
        may_lack: Whether a bias may lack its tensor.

    Returns:
        Place to key; and the places that have the same as an adapted layer, for which it is.
    """
    said = trains_biases(folder.fields)
    if said is None:
        return {}, set()
    modules = dict(model.named_modules())
    owners = Owners(model)
    found: dict[Place, str] = {}
    same: set[Place] = set()
    for path in modules if said == "all" else slots:
        place: Place = path, OWN_BIAS
        if place in keys or inside(path, tops) or not has_bias(modules[path]):
            continue
        layer = kept_for(path, owners)
        if layer is not None:
            first = (layer, OWN_BIAS)
            here = {p: k for p, k in (*keys.items(), *others.items()) if p in (place, first)}
            fault = difference(folder, here, (place, first))
            problems += [fault] if fault else []
            same.add(place)
        elif place in others:
            found[place] = others[place]
        elif not may_lack:
            problems.append(f"{path}.{OWN_BIAS} was trained, and is not in the file")
    own = [path for path, slot in slots.items() if slot.bias]
    problems += bias_faults(modules, [*own, *(path for path, _ in found)], owners, ())
    return found, same
