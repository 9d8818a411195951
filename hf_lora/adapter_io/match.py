"""Where each tensor of an adapter folder goes in a model: each in its place, every place filled."""

import dataclasses
from collections.abc import Collection, Iterable

import torch
from torch import nn

from hf_lora.adapter_io.base_on_disk import describe_changes
from hf_lora.adapter_io.base_weights import vocabulary
from hf_lora.adapter_io.biases import match_biases
from hf_lora.adapter_io.fitting import factor_fault
from hf_lora.adapter_io.loaded_base import LoadedBase
from hf_lora.adapter_io.rename import Renaming, rename
from hf_lora.adapter_io.tasks import BY_PEFT, HEADS
from hf_lora.adapter_io.ties import read_ties
from hf_lora.adapter_io.token_rows import match_rows
from hf_lora.compat.deepspeed import shape_of
from hf_lora.errors import (
    AdapterMismatchError,
    BaseMismatchError,
    listing,
)
from hf_lora.files.data import CONFIG_FILE
from hf_lora.files.foreign import KOHYA
from hf_lora.files.header import BASE_CHANGED
from hf_lora.files.patterns import endings, parents
from hf_lora.files.peft_targets import (
    TARGET_FIELDS,
    promised_layers,
    says_all_linear,
    says_no_target,
)
from hf_lora.files.read import AdapterFolder
from hf_lora.kinds.lora import LOW_RANK
from hf_lora.kinds.table import host_fault, kind_of
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.reading import out_projections
from hf_lora.layers.roles import Layout, Place, Ties
from hf_lora.layers.token_rows import ROWS, TokenRows
from hf_lora.layers.trained import own_tensors, tensor_names, train_fault
from hf_lora.layers.uncalled import unheard
from hf_lora.model.places import adapted_twice
from hf_lora.planning.heads import beside_backbone, output_head
from hf_lora.planning.ties import full_name
from hf_lora.planning.token_rows import row_conflicts
from hf_lora.text import show


@dataclasses.dataclass(frozen=True)
class Match:
    """A checked adapter folder and where each of its tensors goes in a model."""

    folder: AdapterFolder
    slots: dict[str, LayerConfig]
    trained: list[str]
    keys: dict[Place, str]
    """Place in the model to the key in the file."""

    buffers: list[Place]
    """Those of these that are buffers of the base, which a training has moved."""

    biases: list[str]
    """Paths of modules of no adapted layer whose bias was trained."""

    rows: dict[str, TokenRows]
    """Path of each module of which some rows are trained, to these."""

    ties: Ties
    """What is read as the copy at another place, to that."""

    told: list[str]
    """What was resolved or left out on the way."""


MISSING = ("error", "zero")
"""What a layer may be that the file promises and has no tensors for."""


def match_folder(
    folder: AdapterFolder,
    model: nn.Module,
    *,
    check_base: bool,
    missing: str = "error",
    base: LoadedBase | None = None,
) -> Match:
    """Check that every tensor in the folder has its place in ``model`` and every place its tensor.

    With ``missing="zero"`` a layer that the configuration promises may lack its tensors. What the
    base has is read from ``base``; by default from the model itself.

    Raises:
        AdapterMismatchError: Something does not fit; one line each.
        BaseMismatchError: Everything fits, but the base's weights are others.
        StateError: A layer that it is for has no data.
        UnsupportedAdapterError: It is in a format that can only be shown.
    """
    folder.check_usable()
    return _Matching(folder, model, missing, base or LoadedBase(model)).run(check_base)


class _Matching:
    """One comparison of a folder with a model; collects what is found and what is wrong."""

    def __init__(self, folder: AdapterFolder, model: nn.Module, missing: str, base: LoadedBase):
        self.folder = folder
        self.base = base
        self.missing = missing
        self.model = model
        self.modules = dict(model.named_modules())
        self.owned = {
            full_name((path, role)): (path, role)
            for path, module in self.modules.items()
            for role in tensor_names(module)
        }
        self.names: Renaming = rename(
            [*folder.factors, *folder.rows],
            folder.others,
            self.modules.keys() | self.owned.keys(),
            model,
            flat=folder.format == KOHYA,
        )
        self.problems: list[str] = []
        self.advice = ""
        self.told = [*filter(None, [self.names.way.words])]
        self.told += [f"{part!r} in the names was taken off" for part in folder.renamed]
        self.told += [
            f"{key} is what the base has there, and was left out"
            for key in folder.originals.values()
        ]
        self.told += folder.told
        self.keys: dict[Place, str] = {}
        self.slots: dict[str, LayerConfig] = {}
        self.buffers: list[Place] = []
        self.biases: list[str] = []
        self.rows: dict[str, TokenRows] = {}
        self.ties: dict[Place, Place] = {}

    def run(self, check_base: bool) -> Match:
        self._match_factors()
        tops = self._trained_tops()
        copies = self._match_others(set(tops))
        self.rows, keys = match_rows(self.folder, self.model, self.names, self.problems)
        self.problems += row_conflicts(self.rows, {*tops, *self.slots}, (), ())
        self.keys |= {(path, ROWS): key for path, key in keys.items()}
        if self.folder.own is None:
            self.problems += [
                f"{line}; PEFT gives the adapter to the first place alone, hf_lora to all of them"
                for line in adapted_twice(self.model, self.slots, tops)
            ]
        if not self.problems:
            self._compare_with_targets(set(tops))
        self._raise_problems()
        paths = dict.fromkeys(path for path, _ in (*self.keys, *copies, *self.ties))
        repeated = [path for path in (*paths, *self.rows) if path not in self.slots]
        self.base.check_present(list(self.slots), repeated)
        self._compare_copies(copies)
        self._raise_problems()
        unfilled = self.base.unfilled()
        if check_base:
            self._compare_with_fingerprint([*tops, *unfilled.needed, *unfilled.other])
        self.told += self._random_parts(unfilled.needed, tops)
        found = (self.slots, tops, self.keys, self.buffers, self.biases, self.rows, self.ties)
        return Match(self.folder, *found, self.told)

    def _raise_problems(self) -> None:
        if self.problems:
            kind = type(self.model).__name__
            raise AdapterMismatchError(
                listing(
                    f"{self.folder.directory} does not fit this {kind}", self.problems, self.advice
                )
            )

    def _match_factors(self) -> None:
        if self.names.several:
            places = [path.removesuffix(".") or "the model itself" for path in self.names.several]
            self.advice = (
                f"These parts of the model have all its layers: {', '.join(places)}. Load it onto "
                "the one that it is for: hf_lora.load(model.get_submodule(...), source)"
            )
        deaf = unheard([*map(self.names.module, self.folder.factors)], self.modules)
        for name, factors in self.folder.factors.items():
            path = self.names.module(name)
            fault = deaf.get(path) or factor_fault(self.modules.get(path), factors)
            if path in self.slots:
                fault = "named twice"
            if fault:
                self.problems.append(f"{path or 'the model itself'}: {fault}")
                continue
            self.slots[path] = self.folder.slots[name]
            self.keys |= {(path, role): key for role, key in factors.keys.items()}

    def _trained_tops(self) -> list[str]:
        """Return the outermost modules that were trained in full."""
        meant = self._trained_by_header() if self.folder.own else self._trained_by_name()
        tops = [path for path in self.modules if path in meant]
        return [path for path in tops if not any(above in meant for above in parents(path))]

    def _trained_by_header(self) -> set[str]:
        assert self.folder.own is not None
        meant = {name: self.names.module(name) for name in self.folder.own.trained}
        self.problems += [
            f"{name} was trained in full, and the model has no {path}"
            for name, path in meant.items()
            if not path or path not in self.modules
        ]
        return set(meant.values())

    def _trained_by_name(self) -> set[str]:
        """Find what PEFT means: every module whose path ends so, at a dot or not."""
        names = set(self.folder.trained_names)
        # PEFT's class for a task trains its head, also where the list of names was not written
        task = BY_PEFT.get(self.folder.fields.get("task_type") or "")
        heads = frozenset() if task is None else task.heads
        for name in self.folder.others:
            names |= endings(name.rpartition(".")[0], heads)
        if not names:
            return set()
        with_tensors = {path for path, _ in self.owned.values()}
        with_tensors |= {above for path in with_tensors for above in parents(path)}
        meant = set()
        used = set()
        for path in with_tensors - {""}:
            found = endings(self.names.in_file(path) or "", names)
            if found:
                meant.add(path)
                used |= found
        self.problems += [
            f"modules_to_save names {show(name)}, which is neither in the file nor in the model"
            for name in sorted(names - used - HEADS)
        ]
        return meant

    def _match_others(self, tops: set[str]) -> dict[Place, str]:
        """Match what is no factor; return what is no part of a trained module either."""
        found: dict[Place, str] = {}
        for name, key in self.folder.others.items():
            full = self.names.tensor(name)
            place = self.owned.get(full)
            if place is None:
                self.problems.append(f"{key}: the model has no {full}")
            elif place in found:
                self.problems.append(f"{key} and {found[place]} are both for {full}")
            else:
                found[place] = key
                self._check_fit(key, place)
        self.ties = read_ties(self.folder, self.model, self.names, found, tops, self.problems)
        inside = {place for place in self.owned.values() if _is_inside(place[0], tops)}
        inside |= {*self.ties, *self.ties.values()}
        for path in sorted({path for path, _ in inside}):
            fault = train_fault(self.modules[path])
            if path in self.slots:
                fault = "it has factors as well"
            if fault:
                self.problems.append(f"{path} cannot be a module trained in full: {fault}")
        self.problems += [
            f"{full} is missing from the file"
            for full, place in self.owned.items()
            if place in inside and place not in found
        ]
        own = inside - self.ties.keys()
        self.keys |= {place: key for place, key in found.items() if place in own}
        rest = {place: key for place, key in found.items() if place not in inside}
        lacks = self.missing == "zero"
        biases, same = match_biases(
            self.folder,
            self.model,
            self.slots,
            tops,
            rest,
            self.keys,
            self.problems,
            may_lack=lacks,
        )
        self.keys |= biases
        self.biases = [path for path, _ in biases]
        return {place: key for place, key in rest.items() if place not in {*biases, *same}}

    def _check_fit(self, key: str, place: Place) -> None:
        tensor, file = self._base_tensor(place), self.folder.file
        if file.shapes[key] != shape_of(tensor):
            there, here = file.shapes[key], shape_of(tensor)
            tokens = here[:1] == (vocabulary(self.model),) and there[1:] == here[1:]
            way = f"; model.resize_token_embeddings({there[0]}) makes room" if tokens else ""
            self.problems.append(f"{key}: shape {there}, in the model {here}{way}")
        elif file.dtypes[key].is_floating_point != tensor.is_floating_point():
            self.problems.append(f"{key}: {file.dtypes[key]}, in the model {tensor.dtype}")

    def _compare_with_targets(self, tops: set[str]) -> None:
        """Compare the layers in the file with those that its configuration promises."""
        fields, own = self.folder.fields, self.folder.own
        if says_no_target(fields):
            self.told.append("no target_modules is named; the layers that have tensors were taken")
            return
        if own and all(fields.get(name) == own.fields.get(name) for name in TARGET_FIELDS):
            return  # the header names each layer, and has been compared with the tensors
        names = {}
        for path, module in self.modules.items():
            name = self.names.in_file(path) if host_fault(module) is None else None
            if name is not None and not _is_inside(path, tops):
                names[name] = path
        source = str(self.folder.directory / CONFIG_FILE)
        promised = promised_layers(fields, names.keys(), source, self.folder.patience)
        meant = {names[name] for name in promised}
        outs = out_projections(self.slots, self.modules)
        meant |= {out for out, attention in outs.items() if attention in meant}
        optional: set[str] = set()
        if says_all_linear(fields):  # PEFT leaves out heads, by rules of its own
            optional = output_head(self.model) | beside_backbone(self.model).keys()
        # tools that adapt linear layers only also write the names of embeddings there
        held = {layer.layout for layer in self.folder.factors.values()}
        other = [p for p in sorted(meant - self.slots.keys()) if not self._is_held(p, held)]
        if other and not says_all_linear(fields):
            self.told.append(f"{other[0]} ({len(other)} in all) is a target and has no tensors")
        without = sorted(meant - optional - self.slots.keys() - {*other})
        if without and self.missing == "zero":
            self.told.append(
                f"{without[0]} ({len(without)} in all) is a target and has no tensors: missing="
                "'zero' leaves it as it is in the base"
            )
        elif without:
            self.problems += [f"{path} is a target, but has no tensors" for path in without]
            self.advice = (
                "If nothing was lost (the update was zero there), load with missing='zero'."
            )
        self.problems += [
            f"{path} has tensors, but is no target" for path in sorted(self.slots.keys() - meant)
        ]

    def _is_held(self, path: str, layouts: Collection[Layout]) -> bool:
        kind = kind_of(self.modules[path])
        return kind is not None and (kind.lora_layout is LOW_RANK or kind.lora_layout in layouts)

    def _compare_copies(self, copies: dict[Place, str]) -> None:
        """Tell moved buffers from tensors that only repeat the base's own, which are left out."""
        for place, key in copies.items():
            ((_, tensor),) = self.folder.file.read([key])
            equal = self.base.equals(place, tensor)
            if not equal and place[1] in self.modules[place[0]]._buffers:
                self.keys[place] = key
                self.buffers.append(place)
                if self.folder.own is None:
                    self.told.append(f"{key} is a buffer of the base, and is the adapter's now")
            elif not equal:
                self.problems.append(
                    f"{key}: neither a factor nor part of a module in modules_to_save, and not "
                    "what the base has there (were tokens added? hf_lora.from_pretrained loads the "
                    "base and puts them in)"
                )
            elif self.folder.own is None:
                self.told.append(f"{key} only repeats the base's own weight and was left out")

    def _random_parts(self, unfilled: Iterable[str], tops: list[str]) -> list[str]:
        """Return a line for each part of a task's model that nobody fills."""
        return [
            f"{path} is neither in the base's checkpoint nor in the adapter: what it holds is "
            "random, and so is what the model answers"
            for path in unfilled
            if not _is_inside(path, tops)
        ]

    def _compare_with_fingerprint(self, others: list[str]) -> None:
        """Compare the base, except for ``others``: what the adapter brings, and what is random."""
        fingerprint = self.folder.header and self.folder.header.get("fingerprint")
        if not isinstance(fingerprint, dict):
            return
        rows = {full_name((path, "weight")): own.ids for path, own in self.rows.items()}
        found = self.base.differences(fingerprint, self.names, others, rows)
        if found:
            base = self.folder.base or "another model"
            changed = (self.folder.header or {}).get(BASE_CHANGED)
            if isinstance(changed, dict):
                found += [
                    f"the file says of its base: {line}" for line in describe_changes(changed)
                ]
            raise BaseMismatchError(
                listing(
                    f"{self.folder.directory} was trained on {base}, and this model's weights are "
                    "others",
                    found,
                    "Load the right base, or pass check_base=False if you know that this is "
                    "wanted.",
                )
            )

    def _base_tensor(self, place: Place) -> torch.Tensor:
        path, role = place
        return dict(own_tensors(self.modules[path], (role,)))[role]


def _is_inside(path: str, tops: Iterable[str]) -> bool:
    return path in tops or any(above in tops for above in parents(path))
