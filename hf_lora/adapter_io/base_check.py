"""Is this the base that an adapter was trained on? Fingerprints taken of models, and compared."""

import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from hf_lora.adapter_io.base_weights import BaseTensor, BaseTensors
from hf_lora.adapter_io.collective import is_main_process
from hf_lora.adapter_io.rename import Renaming
from hf_lora.errors import StateError
from hf_lora.files import sampled_layers
from hf_lora.files.fingerprint import (
    Fingerprint,
    Sample,
    difference,
    from_json,
    positions,
    to_json,
    without_rows,
)
from hf_lora.files.keys import without_wrappers
from hf_lora.targets import inside

Rows = Mapping[str, Collection[int]]
"""Name of a tensor to those of its rows of which an adapter has its own."""

NO_ROWS: Rows = MappingProxyType({})


def of_tied(rows: Rows, ties: Mapping[str, str]) -> dict[str, Collection[int]]:
    """Return rows under the name, too, under which a fingerprint has a tied tensor."""
    return {**rows, **{ties[name]: ids for name, ids in rows.items() if name in ties}}


def take_fingerprint(
    base: BaseTensors, trained: Collection[str], moved: Collection[str] = (), rows: Rows = NO_ROWS
) -> dict[str, Any]:
    """Return the fingerprint of a base, as the header holds it.

    Args:
        base: The base's tensors.
        trained: Paths of the modules that an adapter trains in full: their tensors, and those that
            are tied to them, are the adapter's own.
        moved: Names of buffers that the training has moved in the base itself.
        rows: What an adapter has rows of; what the base has there is not sampled.
    """
    left_out = {
        base.ties.get(name, name)
        for name, held in base.named()
        if inside(name.rpartition(".")[0], trained) or held.tensor().requires_grad
    }
    kept = {name: held for name, held in base.tensors.items() if name not in left_out}
    still = {name: held for name, held in kept.items() if name not in moved}
    values = base.read({name: positions(held.shape) for name, held in still.items()})
    for name, ids in rows.items():
        first = base.ties.get(name, name)
        if first in values:
            values[first] = without_rows(values[first], kept[first].shape, ids)
    samples = {
        name: Sample(held.shape, values.get(name), held.quantized) for name, held in kept.items()
    }
    ties = {name: to for name, to in base.ties.items() if to in kept}
    return to_json(samples, ties, base.vocabulary)


def base_differences(
    content: dict[str, Any],
    base: BaseTensors,
    names: Renaming,
    others: Collection[str],
    rows: Rows = NO_ROWS,
) -> list[str]:
    """Return a line for each thing in which a base is not the one of a fingerprint.

    Every process takes part.

    Args:
        content: The fingerprint, as the header holds it; a stranger may have changed it.
        base: The base's tensors.
        names: How the file's names become the model's.
        others: Paths of modules, and names of tensors, that are no part of the base: the adapter
            brings them, or they were never loaded and are random.
        rows: What the adapter brings rows of.

    Raises:
        StateError: Tensors to compare have no data.
    """
    found = from_json(content)
    if found is None:
        return _layer_differences(content, base, names)
    return _Comparison(found, base, names, others, rows).lines()


class _Comparison:
    def __init__(
        self,
        then: Fingerprint,
        base: BaseTensors,
        names: Renaming,
        others: Collection[str],
        rows: Rows,
    ):
        self.rows = of_tied({without_wrappers(n): ids for n, ids in rows.items()}, base.ties)
        self.then = then
        self.base = base
        self.names = names
        self.others = set(map(without_wrappers, others))
        self.lines_found = [f"{name}: the recorded sample is damaged" for name in then.damaged]
        self.pairs: list[tuple[str, Sample, BaseTensor]] = []
        """Name here, what was recorded, and what is here."""

    def lines(self) -> list[str]:
        """Compare sizes and structure, then numbers."""
        here = {}
        for name, held in self.base.named():
            module, _, role = name.rpartition(".")
            path = None if inside(name, self.others) else self.names.in_file(module)
            if path is not None:
                here[f"{path}.{role}" if path else role] = (name, held)
        there = self.then.samples | {
            name: self.then.samples[to]
            for name, to in self.then.ties.items()
            if to in self.then.samples
        }
        self._compare_vocabulary()
        self.lines_found += _structure(there, {name: held for name, (_, held) in here.items()})
        for name in there.keys() & here.keys():
            name_here, held = here[name]
            self._compare_shapes(name_here, held, there[name])
        self._compare_numbers()
        return self.lines_found

    def _compare_vocabulary(self) -> None:
        then, now = self.then.vocabulary, self.base.vocabulary
        if then is not None and now is not None and now < then:
            self.lines_found.append(
                f"the base had a vocabulary of {then} tokens, this model has {now}; load one with "
                f"the added tokens (model.resize_token_embeddings({then}) makes room, with rows of "
                "its own)"
            )

    def _compare_shapes(self, name: str, held: BaseTensor, recorded: Sample) -> None:
        then, now = recorded.shape, held.shape
        if then == now or self._resized(then, now):
            self.pairs.append((name, recorded, held))
        else:
            self.lines_found.append(f"{name} has shape {now}, in the base {then}")

    def _resized(self, then: tuple[int, ...], now: tuple[int, ...]) -> bool:
        """Say whether two shapes differ in the number of tokens alone, at their first dimension.

        Some biases are kept as one row.
        """
        tokens = (self.then.vocabulary, self.base.vocabulary)
        while then[:1] == now[:1] == (1,):
            then, now = then[1:], now[1:]
        return (then[:1], now[:1]) == ((tokens[0],), (tokens[1],)) and then[1:] == now[1:]

    def _compare_numbers(self) -> None:
        recorded = {}
        for name, sample, held in sorted(self.pairs, key=lambda pair: pair[0]):
            values = sample.first(math.prod(held.shape))
            if values is not None and len(values):
                recorded[name] = (values, sample.quantized or held.quantized)
        at = {
            name: positions(sample.shape)[: len(recorded[name][0])]
            for name, sample, _ in self.pairs
            if name in recorded
        }
        _check_data(self.base.on_meta(at))
        now = self.base.read({name: at[name] for name in sorted(at)})
        for name, values in now.items():
            then, quantized = recorded[name]
            if name in self.rows:
                shape = next(sample.shape for other, sample, _ in self.pairs if other == name)
                then, values = (without_rows(t, shape, self.rows[name]) for t in (then, values))
            fault = difference(then, values, quantized)
            if fault:
                self.lines_found.append(f"{name}: {fault}")


def _structure(there: Iterable[str], here: dict[str, BaseTensor]) -> list[str]:
    """Return a line for each module in a stack of blocks that only one of two models has.

    What lies beside the stacks (heads, embeddings, another modality) is compared where both have
    it: an adapter may serve a model with another head.
    """
    then, now = _roles(there), _roles(here)
    both = {stack for path in then if (stack := _stack(path))} & {
        stack for path in now if (stack := _stack(path))
    }
    lines = []
    for stack in sorted(both):
        blocks = [{_block(path) for path in side if _stack(path) == stack} for side in (then, now)]
        if blocks[0] != blocks[1]:
            lines.append(
                f"{stack} has {len(blocks[1])} blocks, in the base that it was trained on "
                f"{len(blocks[0])}"
            )
            continue
        for path in sorted(path for path in then.keys() ^ now.keys() if _stack(path) == stack):
            lines.append(f"{path} is in {'the base' if path in then else 'this model'} only")
    for path in sorted(then.keys() & now.keys()):
        packed = ("weight" in then[path]) != ("weight" in now[path])  # GPTQ and its like
        for role in sorted(then[path] ^ now[path]) if not packed else ():
            where = "the base" if role in then[path] else "this model"
            lines.append(f"{path}.{role} is in {where} only")
    return lines


def _roles(names: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in names:
        path, _, role = name.rpartition(".")
        found.setdefault(path, set()).add(role)
    return found


def _stack(path: str) -> str | None:
    """Return the path of the stack that a module is in: what stands before the first number."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[:at]) or "the model itself"


def _block(path: str) -> str:
    return next(part for part in path.split(".") if part.isdigit())


def _layer_differences(content: dict[str, Any], base: BaseTensors, names: Renaming) -> list[str]:
    """Compare with a fingerprint of an older hf_lora, which has weights of targeted layers only."""
    recorded = {}
    for path, sample in sampled_layers.sampled_layers(content).items():
        module = without_wrappers(names.module(path))
        name = f"{module}.weight" if module else "weight"
        held = base.find(name)
        if held is not None:
            recorded[name] = (module, held, sample)
    at = {
        name: sampled_layers.positions(math.prod(held.shape))
        for name, (_, held, _) in recorded.items()
    }
    _check_data(base.on_meta(at))
    lines = []
    for name, values in base.read(at).items():
        module, held, sample = recorded[name]
        quantized = held.quantized or bool(content.get("quantized"))
        fault = sampled_layers.difference(sample, values, quantized)
        if fault:
            lines.append(f"{module}: {fault}")
    return lines


def _check_data(meta: list[str]) -> None:
    # where only the first process loads the base, and sends it to the others, it compares
    if meta and is_main_process():
        raise StateError(
            f"{len(meta)} modules are on the meta device (first: {meta[0]}), so the base cannot be "
            "compared with the one that the adapter was trained on; load the weights first, or "
            "pass check_base=False and load them afterwards."
        )
