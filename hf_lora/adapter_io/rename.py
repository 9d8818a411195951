"""Finding a model's modules under the names that an adapter file uses for them.

Files come from backbones and head models, from other versions of transformers, from wrapped models,
from the text model inside a vision-language model. Each
known way of renaming is tried in turn; the first under which every name is found wins.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator

from torch import nn

from hf_lora.compat.libraries import is_pretrained
from hf_lora.files.keys import without_wrappers

Rename = Callable[[str], str]

_MODELS = frozenset({"model", "language_model", "text_model", "transformer", "llm", "base_model"})
"""What models are called inside of models."""


@dataclasses.dataclass(frozen=True)
class KeyMapping:
    """One way in which names in a file become names in a model, and back."""

    module: Rename
    tensor: Rename
    module_back: Callable[[str], str | None]
    """The name that the file would have used for a module; None if it could not have had it."""

    words: str = ""
    """What it does, or ``""`` if it does nothing."""


@dataclasses.dataclass(frozen=True)
class Renaming:
    """The way that was found, on the model's real names."""

    way: KeyMapping
    real: dict[str, str]
    """Names without what torch.compile and FSDP put into them, to the names as they are."""

    used: dict[str, str]
    """Path of each module in the file, to its name there: the way back need not be unique."""

    several: tuple[str, ...] = ()
    """Where in the model the file's names are found, if that is in several places."""

    def module(self, name: str) -> str:
        """Return the path in the model of a module of the file."""
        path = self.way.module(name)
        return self.real.get(path, path)

    def tensor(self, name: str) -> str:
        """Return the full name in the model of a parameter or buffer of the file."""
        full = self.way.tensor(name)
        return self.real.get(full, full)

    def in_file(self, path: str) -> str | None:
        """Return what the file would have called the module at ``path``, or None."""
        plain = without_wrappers(path)
        return self.used.get(plain) or self.way.module_back(plain)


def rename(
    modules: Collection[str],
    tensors: Collection[str],
    known: Collection[str],
    model: nn.Module,
    *,
    flat: bool = False,
) -> Renaming:
    """Return how names in a file become names in ``model``.

    Args:
        modules: Names of modules in the file.
        tensors: Names of parameters and buffers in the file.
        known: All names of modules, parameters and buffers that the model has.
        model: The model.
        flat: Whether the file's names have ``_`` for ``.``.

    Returns:
        The first way that finds all names; if there is none, the one that finds most.
    """
    real = {without_wrappers(name): name for name in known}
    if flat:
        way = _flat(real)
        return Renaming(way, real, {way.module(name): name for name in modules})
    most, best = -1, KeyMapping(_same, _same, _same)
    for way in _ways([*modules, *tensors], real, model):
        hits = sum(way.module(name) in real for name in modules)
        hits += sum(way.tensor(name) in real for name in tensors)
        if hits == len(modules) + len(tensors):
            best = way
            break
        if hits > most:
            most, best = hits, way
    else:
        moved = _moved(modules, tensors, real, model, least=most + 1)
        if len(moved) > 1:
            return Renaming(best, real, {}, several=tuple(sorted(moved)))
        best = next(iter(moved.values()), best)
    return Renaming(best, real, {best.module(name): name for name in modules})


def _moved(
    modules: Collection[str],
    tensors: Collection[str],
    real: Collection[str],
    model: nn.Module,
    least: int,
) -> dict[str, KeyMapping]:
    """Return ways that look for the file's model in another part of this one: place to way.

    Those that find most names, and at least so many; several if they find them in several places.
    """
    inside = [without_wrappers(p) for p, m in model.named_modules() if p and is_pretrained(m)]
    leads = _leads_of_models(modules, _MODELS.union(*(path.split(".") for path in inside)))
    places = [f"{path}." for path in inside]
    found: dict[str, KeyMapping] = {}
    images: set[tuple[str, ...]] = set()
    for lead, place in itertools.product(leads, ["", *places]):
        way = _with_place(lead, place)
        image = tuple(map(way.module, modules))
        hits = sum(name in real for name in image) + sum(way.tensor(n) in real for n in tensors)
        if lead == place or hits < least or image in images:
            continue
        if hits > least:
            found, images, least = {}, set(), hits
        found[place] = way
        images.add(image)
    return found


def _leads_of_models(names: Collection[str], models: Collection[str]) -> list[str]:
    """Return the beginnings of names that lead to a model; others lead to a part of one."""
    found = {"": None}
    for name in names:
        lead = ""
        for part in name.split("."):
            if part not in models:
                break
            lead += f"{part}."
            found[lead] = None
    return list(found)


def _with_place(lead: str, place: str) -> KeyMapping:
    def there(name: str) -> str:
        return place + name.removeprefix(lead) if name.startswith(lead) else name

    return KeyMapping(
        there,
        there,
        lambda path: lead + path.removeprefix(place) if path.startswith(place) else None,
        f"trained on another model around or inside of this one: {lead!r} at the beginning of its "
        f"names became {place!r}",
    )


def _ways(names: list[str], real: Collection[str], model: nn.Module) -> Iterator[KeyMapping]:
    plain = KeyMapping(_same, _same, _same)
    yield plain
    starts = [plain, *_converted(model)]
    yield from starts[1:]
    prefix = getattr(model, "base_model_prefix", "")
    for start in starts:
        if prefix and hasattr(model, prefix):
            yield _with_prefix(start, f"{prefix}.")
        for lead in _common_leads(names, real, start):
            yield _without_lead(start, lead)


def _flat(real: Collection[str]) -> KeyMapping:
    """Return the way of kohya's names, which have ``_`` for ``.``; what could be two is neither."""
    known: dict[str, str | None] = {}
    for name in real:
        flat = name.replace(".", "_")
        known[flat] = None if flat in known else name

    def there(name: str) -> str:
        # transformers 5 took this off the names of CLIP
        return known.get(name) or known.get(name.removeprefix("text_model_")) or name

    return KeyMapping(there, there, lambda path: path.replace(".", "_"))


def _with_prefix(start: KeyMapping, prefix: str) -> KeyMapping:
    return KeyMapping(
        lambda name: start.module(f"{prefix}{name}"),
        lambda name: start.tensor(f"{prefix}{name}"),
        lambda path: _take_off(prefix, start.module_back(path)),
        f"{_begin(start)}trained on the backbone alone: {prefix!r} was put before its names",
    )


def _without_lead(start: KeyMapping, lead: str) -> KeyMapping:
    return KeyMapping(
        lambda name: start.module(name.removeprefix(lead)),
        lambda name: start.tensor(name.removeprefix(lead)),
        lambda path: None if (name := start.module_back(path)) is None else f"{lead}{name}",
        f"{_begin(start)}trained on a model around this one: {lead!r} was taken off its names",
    )


def _begin(start: KeyMapping) -> str:
    return f"{start.words}; " if start.words else ""


def _take_off(prefix: str, name: str | None) -> str | None:
    return name.removeprefix(prefix) if name is not None and name.startswith(prefix) else None


def _common_leads(names: list[str], real: Collection[str], start: KeyMapping) -> Iterator[str]:
    """Yield the dotted beginnings that all names share and whose absence makes the first known."""
    first = names[0] if names else ""
    at = first.find(".")
    while at >= 0:
        lead, rest = first[: at + 1], first[at + 1 :]
        if (start.module(rest) in real or start.tensor(rest) in real) and all(
            name.startswith(lead) for name in names
        ):
            yield lead
        at = first.find(".", at + 1)


def _converted(model: nn.Module) -> list[KeyMapping]:
    """Return transformers' own conversion of a checkpoint's names, if it has one for this model."""
    if not is_pretrained(model):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    found = [item for item in mapping if isinstance(item, WeightRenaming)]
    if not found:
        return []
    try:
        back = [item.reverse_transform() for item in reversed(found)]
    except ValueError:  # one that cannot be turned round
        back = []

    def tensor(name: str) -> str:
        for item in found:
            name = item.rename_source_key(name)[0]
        return name

    def module(name: str) -> str:
        return tensor(f"{name}.weight").removesuffix(".weight")

    def module_back(path: str) -> str:
        key = f"{path}.weight"
        for item in back:
            key = item.rename_source_key(key)[0]
        name = key.removesuffix(".weight")
        return name if module(name) == path else path

    words = "names of an older transformers were converted"
    return [KeyMapping(module, tensor, module_back, words)]


def _same(name: str) -> str:
    return name
