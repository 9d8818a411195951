"""Ties in files: which tensors of a file are one, and what PEFT ties if it is asked to.

PEFT (0.21) has one tie: of the input embeddings, with whatever transformers ties to them. It wraps
each of those in a linear layer without bias on the embeddings' copy, so for an embedding, or for a
head with a bias, it cannot be asked. Nor does it see that it is meant unless a module by one of two
names is trained. Where it cannot, its file has every tied module as one of its own. In any case it
wants a tensor for each module in the file.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from hf_lora.adapter_io.rename import Renaming
from hf_lora.adapter_io.vocabulary import embedding
from hf_lora.compat.deepspeed import shape_of
from hf_lora.files.peft_format import names_embeddings
from hf_lora.files.read import AdapterFolder
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.roles import Place, Ties
from hf_lora.layers.trained import tensor_names
from hf_lora.planning.ties import Owners, full_name, groups
from hf_lora.targets import inside


def peft_would_tie(
    model: nn.Module, ties: Ties, trained: Collection[str], names: Iterable[str]
) -> bool:
    """Say whether PEFT ties just what an adapter ties, if its file asks for it.

    Args:
        model: The model.
        ties: What the adapter ties.
        trained: Paths of its modules that are trained in full.
        names: What the file calls these and those that follow them.
    """
    # inside of one trained module PEFT keeps by itself what is tied
    apart = [{p for p, _ in places} for places in groups(ties) if not _in_one(places, trained)]
    meant = tied_by_peft(model)
    return (
        bool(meant)
        and apart == [{input_embeddings(model), *meant}]
        and all(_is_plain_linear(model.get_submodule(path)) for path in meant)
        and names_embeddings(names)
    )


def read_ties(
    folder: AdapterFolder,
    model: nn.Module,
    names: Renaming,
    found: dict[Place, str],
    tops: Collection[str],
    problems: list[str],
) -> dict[Place, Place]:
    """Return what shares one copy, as the adapter was trained, to where that is.

    Args:
        folder: The adapter.
        model: The model, in which these need not be tied.
        names: How the file's names become the model's.
        found: Place of each tensor to its key in the file. Where that has a tied tensor under some
            of its names, the others get the same key.
        tops: Paths of the modules that are trained in full.
        problems: Gets a line for each tie that cannot be kept.
    """
    if folder.own is not None:
        said = folder.own.ties.items()
        pairs = {_place(names.tensor(one)): _place(names.tensor(to)) for one, to in said}
    else:
        pairs = _asked_of_peft(folder, model, found, tops) if folder.ties_embeddings else {}
    modules = dict(model.named_modules())
    sound = {}
    for pair in pairs.items():
        fault = _fault(modules, pair) or difference(folder, found, pair)
        if fault:
            problems.append(fault)
        else:
            sound[pair[0]] = pair[1]
    if folder.own is None:
        sound |= {p: to for p, to in _within(model, tops) if not difference(folder, found, (p, to))}
    everything = [(path, role) for path, m in modules.items() for role in tensor_names(m)]
    ties = _one_step(sound, everything)
    for place, first in ties.items():
        if place in found:
            found.setdefault(first, found[place])
    found |= {place: found[first] for place, first in ties.items() if first in found}
    return ties


def tied_by_peft(model: nn.Module) -> set[str]:
    """Return the paths of the modules that PEFT takes to be tied to the input embeddings."""
    source = input_embeddings(model)
    said = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    if source is None or said is False or not hasattr(model, "_tied_weights_keys"):
        return set()
    weight = parameter_of(model.get_submodule(source), "weight")
    everything = model.named_parameters(remove_duplicate=False)
    candidates = {name for name, parameter in everything if parameter is weight}
    found = set()
    for path, module in model.named_modules():
        keys = getattr(module, "_tied_weights_keys", None)
        found |= {
            full_name((path, target)).rpartition(".")[0]
            for target, to in (keys.items() if isinstance(keys, dict) else ())
            if full_name((path, to)) in candidates
        }
    return {path for path in found - {source} if f"{path}.weight" in candidates}


def input_embeddings(model: nn.Module) -> str | None:
    """Return the path of a model's input embeddings."""
    found = embedding(model, "get_input_embeddings")
    return next((path for path, module in model.named_modules() if module is found), None)


def _asked_of_peft(
    folder: AdapterFolder, model: nn.Module, found: Collection[Place], tops: Collection[str]
) -> dict[Place, Place]:
    """Return what PEFT ties for a file of its own that asks for it.

    PEFT leaves the names of what is tied out of its files, and then does not see itself that
    embeddings of another name are meant. But their tensors are there.
    """
    source = input_embeddings(model)
    tied = {path: (path, "weight") for path in tied_by_peft(model)}
    heeded = names_embeddings(folder.trained_names) or any(
        place in found and not inside(path, tops) for path, place in tied.items()
    )
    if source is None or not tops or not heeded:
        return {}
    return dict.fromkeys(tied.values(), (source, "weight"))


def _within(model: nn.Module, tops: Collection[str]) -> Iterator[tuple[Place, Place]]:
    """Yield what is tied inside of one trained module, which PEFT copies as it is."""
    owners = Owners(model)
    for top in tops:
        for places in groups(owners.ties([top])):
            first, *others = (place for place in places if inside(place[0], (top,)))
            yield from ((place, first) for place in others)


def _fault(modules: Mapping[str, nn.Module], pair: tuple[Place, Place]) -> str | None:
    shapes = []
    for path, role in pair:
        parameter = parameter_of(modules[path], role) if path in modules else None
        if parameter is None or not path:
            return f"{full_name((path, role))} is tied to another, and the model has none"
        shapes.append(shape_of(parameter))
    if shapes[0] != shapes[1]:
        one, other = map(full_name, pair)
        return f"{one} and {other} are one tensor, and in the model {shapes[0]} and {shapes[1]}"
    return None


def difference(
    folder: AdapterFolder, found: Mapping[Place, str], pair: tuple[Place, Place]
) -> str | None:
    """Return a line if a file holds two places' tensors, and they are not the same."""
    keys = [found[place] for place in pair if place in found]
    if len(keys) < 2:
        return None
    (_, one), (_, other) = folder.file.read(keys)
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    if one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat):
        return None
    return f"{keys[0]} and {keys[1]} are one tensor in this adapter, and differ in the file"


def _one_step(pairs: Ties, everything: Iterable[Place]) -> dict[Place, Place]:
    """Return each place of a group, however it is put together, to the first in the model."""
    group: dict[Place, list[Place]] = {}
    for one, other in pairs.items():
        both = list(dict.fromkeys([*group.get(one, [one]), *group.get(other, [other])]))
        group |= dict.fromkeys(both, both)
    firsts: dict[int, Place] = {}
    for place in everything:
        if place in group:
            firsts.setdefault(id(group[place]), place)
    ties = {p: firsts[id(places)] for p, places in group.items() if id(places) in firsts}
    return {place: first for place, first in ties.items() if place != first}


def _in_one(places: Iterable[Place], tops: Collection[str]) -> bool:
    around = [{top for top in tops if inside(path, (top,))} for path, _ in places]
    return bool(set.intersection(*around))


def _is_plain_linear(module: nn.Module) -> bool:
    alone = not module._modules and tensor_names(module) == ("weight",)
    return isinstance(module, nn.Linear) and alone


def _place(full: str) -> Place:
    path, _, role = full.rpartition(".")
    return path, role
