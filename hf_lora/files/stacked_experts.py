"""Factors of experts in a file of PEFT's, which names neither the parameter nor how many there are.

Each of a module's adapted parameters has a wrapper around the module. So of two, the first one's
factors are under ``experts.base_layer.lora_A.weight``, the second one's under
``experts.lora_A.weight``, and ``target_parameters`` says which parameters these are.
"""

from collections.abc import Iterable

from hf_lora.errors import AdapterFileError, listing
from hf_lora.files.data import LayerTensors
from hf_lora.files.patterns import TailIndex, tails
from hf_lora.kinds.experts import EXPERTS, PARTS, part_roles
from hf_lora.kinds.lora import LOW_RANK
from hf_lora.layers.names import LORA_A, LORA_B
from hf_lora.text import show

_INNER = ".base_layer"

Layers = dict[str, LayerTensors]


def with_experts(
    found: Layers, named: Iterable[str], source: str
) -> tuple[Layers, dict[str, tuple[str, ...]]]:
    """Return layers in which the tensors of experts stand together, under their parameters' names.

    Args:
        found: Path of each layer to its tensors, as their names are.
        named: The parameters that the file names.
        source: What to name in errors.

    Returns:
        The layers; and path of each layer of experts to its adapted parameters, in order.

    Raises:
        AdapterFileError: There are more or fewer tensors than such parameters.
    """
    stacked = [name for name in named if name.rpartition(".")[2] in PARTS]
    if not stacked:
        return found, {}
    index = TailIndex(stacked)
    layers = dict(found)
    parts: dict[str, tuple[str, ...]] = {}
    problems = []
    used: set[str] = set()
    for path in found:
        own = tuple(part for part in PARTS if index.means(f"{path}.{part}"))
        used |= {tail for part in own for tail in tails(f"{path}.{part}") if tail in index.names}
        if not own:
            continue
        held = [path]
        while f"{held[-1]}{_INNER}" in found:
            held.append(f"{held[-1]}{_INNER}")
        if len(held) != len(own):
            problems.append(
                f"{path} has factors of {len(held)} parameters, and target_parameters names "
                f"{len(own)} there: {', '.join(own)}"
            )
            continue
        wrong = [each for each in held if found[each].layout is not LOW_RANK]
        if wrong:
            problems.append(f"{wrong[0]} has tensors of another kind than experts have")
            continue
        innermost_first = [layers.pop(each) for each in held][::-1]
        layers[path] = _together(own, innermost_first)
        parts[path] = own
    problems += [
        f"target_parameters names {show(name)}, of which there are no factors"
        for name in sorted(index.names - used)
    ]
    if problems:
        raise AdapterFileError(listing(f"{source} is not a sound adapter", problems))
    return layers, parts


def _together(parts: tuple[str, ...], each: list[LayerTensors]) -> LayerTensors:
    keys: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, held in zip(parts, each, strict=True):
        for role, factor in zip(part_roles(part), (LORA_A, LORA_B), strict=True):
            keys[role], shapes[role] = held.keys[factor], held.shapes[factor]
    return LayerTensors(EXPERTS, keys, shapes)
