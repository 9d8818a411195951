"""The plan: everything that wrapping will do, found out without touching the model.

Works on a model without weights (on the meta device) as well. :func:`hf_lora.wrap` executes
exactly this plan, or refuses with all its problems at once.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from hf_lora.config import WORDS, LoRAConfig
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.roles import Layout, Shapes, Ties
from hf_lora.layers.token_rows import TokenRows
from hf_lora.planning.clients import scaled_otherwise, vllm_rank
from hf_lora.planning.token_rows import RowTarget
from hf_lora.planning.towers import Tower


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Where on a model adapters are: paths of low-rank updates, of what trains in full, of rows."""

    low_rank: Collection[str] = ()
    in_full: Collection[str] = ()
    rows: Collection[str] = ()
    stood: Mapping[int, Mapping[str, torch.Tensor]] = dataclasses.field(default_factory=dict)
    """Of each module that a merge has changed, by its id, what stood there before."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One layer that gets a low-rank update."""

    path: str
    host: str
    """The layer's class."""

    shapes: Shapes
    """What the adapter has there: role to shape, such as ``lora_A`` to (r, in)."""

    layout: Layout
    slot: LayerConfig
    dtype: torch.dtype
    tied_to: tuple[str, ...]
    """Other modules that share the layer's weight; a merge unties it."""

    @property
    def parameters(self) -> int:
        """Trainable numbers; of a linear layer ``r · (in + out)``."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def in_features(self) -> int | None:
        """Width that the layer reads, if it is one that has such a width."""
        return self.layout.widths(self.shapes)[0] if self.layout.widths else None

    @property
    def out_features(self) -> int | None:
        """Width that it gives."""
        return self.layout.widths(self.shapes)[1] if self.layout.widths else None

    @property
    def bytes(self) -> int:
        """Size of all of them."""
        return self.parameters * self.dtype.itemsize

    @property
    def parameter_bytes(self) -> int:
        """Size of what receives gradients: all of it."""
        return self.bytes


@dataclasses.dataclass(frozen=True)
class Trained:
    """One module that is trained in full."""

    path: str
    host: str
    parameters: int
    parameter_bytes: int
    """Size of what receives gradients."""

    bytes: int
    """Size of everything that is copied: parameters, and buffers such as running means."""

    tied_to: tuple[str, ...]
    """Other modules that share a tensor with it. They read the adapter's one copy of that, too;
    where several of them are trained, it is counted with the first."""


@dataclasses.dataclass(frozen=True)
class PerRank:
    """What one of several processes keeps and sends, in bytes, beside activations."""

    strategy: str
    """How they share the work, such as ``"FSDP2"``."""

    weights: int
    """Of the base and the adapter, on the device, all the time."""

    gradients: int
    """Of the adapter."""

    optimizer: int
    """Adam's moments, and what DeepSpeed keeps beside them."""

    sent: int
    """Sent in an optimizer step of one forward and backward."""

    sent_in_full: int
    """The same if all of the base trained instead of an adapter."""

    gathered: int = 0
    """Weights that are put together for the moment: two blocks, and what lies outside of blocks."""

    host: int = 0
    """In the memory of the CPU."""

    sent_per_token: int = 0
    """Sent for each token of a step, besides."""

    sent_to_save: int = 0
    """Sent when an adapter is saved: what of it no process has whole."""

    @property
    def device(self) -> int:
        """All of it on the device."""
        return self.weights + self.gathered + self.gradients + self.optimizer


@dataclasses.dataclass(frozen=True)
class Plan:
    """What :func:`hf_lora.wrap` would do. ``print(plan)`` shows it as a table."""

    model: str
    config: LoRAConfig
    targets: tuple[Target, ...]
    trained: tuple[Trained, ...]
    matches: Mapping[str, int]
    """Pattern to the number of layers that it adapts."""

    left_out: Mapping[str, str]
    """Path of a module that a pattern means but that is not adapted, to the reason."""

    problems: tuple[str, ...]
    """What makes ``wrap`` refuse; empty when it would go through."""

    warnings: tuple[str, ...]
    """What may make an update useless; ``wrap`` warns of it."""

    notes: tuple[str, ...]
    """What is worth knowing: tied weights, experts that no pattern can reach, why some way to share
    the work is not in ``per_rank``."""

    vllm: tuple[str, ...]
    """Why vLLM could not serve the adapter; empty when it can."""

    llama_cpp: tuple[str, ...]
    """Why llama.cpp would compute something else with it, or refuse it; empty when it would not."""

    base_parameters: int
    base_bytes: int

    world: int = 1
    """Among how many processes the work is shared."""

    per_rank: tuple[PerRank, ...] = ()
    """What each of them keeps and sends, for each way to share it; empty for one process."""

    missed: tuple[str, ...] = ()
    """What the targets mean and no update reaches: experts, layers that a word leaves out because
    they cannot do with one, and towers of which no pattern means a layer; ``wrap`` warns of it."""

    fresh: tuple[str, ...] = ()
    """Paths of those in ``trained`` that nobody named: the base's checkpoint did not fill them."""

    unfilled: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What else it did not fill, to the reason why that does not train: it stays random, and is
    not in the adapter's file. ``wrap`` warns of it, unless ``train=()`` says that it is known."""

    frozen_norms: tuple[str, ...] = ()
    """Paths of the normalizations with running statistics that do not train: they use those that
    they have, also while the model trains, and do not move them."""

    buffers: tuple[str, ...] = ()
    """Names of the base's buffers that the adapter holds, and its file, if the training moves them:
    a router's balancing bias, a running mean. Which will move is not known before."""

    ties: Ties = dataclasses.field(default_factory=dict)
    """What is read as the copy of a tensor elsewhere, because the base ties the two: place of the
    one, as (path of the module, name of the tensor), to that of the copy."""

    biases: tuple[Trained, ...] = ()
    """Modules of no adapted layer, of which the bias alone trains."""

    rows: tuple[RowTarget, ...] = ()
    """The modules of which some rows train."""

    tied_bytes: int = 0
    """Size of what a file holds beside what trains: that one tensor, for each of the modules."""

    untouched: int = 0
    """How many of the base's parameters are in layers that are neither adapted nor trained."""

    towers: tuple[Tower, ...] = ()
    """The parts of a model that sees and writes, or encodes and decodes, and how many layers
    of each get an update; none where a model is one row of blocks."""

    @property
    def _everything(self) -> tuple[Target | Trained | RowTarget, ...]:
        return (*self.targets, *self.trained, *self.biases, *self.rows)

    @property
    def copied_biases(self) -> list[str]:
        """Paths of the modules of which the adapter has a copy of the bias alone."""
        own = (target.path for target in self.targets if target.slot.bias)
        return [*own, *(item.path for item in self.biases)]

    @property
    def parameters(self) -> int:
        """Trainable numbers in all."""
        return sum(item.parameters for item in self._everything)

    @property
    def all_rows(self) -> dict[str, TokenRows]:
        """Path of each module in which rows train, also of tied ones, to these."""
        found = {}
        for item in self.rows:
            found[item.path] = TokenRows(item.ids)
            found |= {path: TokenRows(item.ids, item.path) for path in item.tied_to}
        return found

    @property
    def weight_bytes(self) -> int:
        """Memory of the adapter's tensors."""
        return sum(item.bytes for item in self._everything)

    @property
    def gradient_bytes(self) -> int:
        """Memory of their gradients."""
        return sum(item.parameter_bytes for item in self._everything)

    @property
    def adam_bytes(self) -> int:
        """Memory of Adam's two moments for them."""
        return 2 * self.gradient_bytes

    @property
    def file_bytes(self) -> int:
        """Size of the adapter's tensors on disk at their own type."""
        return self.weight_bytes + self.tied_bytes

    def __str__(self) -> str:
        """Return the plan as a table, then what is left out, the costs and the problems."""
        return "\n".join(_lines(self))


def _lines(plan: Plan) -> Iterable[str]:
    groups: dict[tuple, list[Target]] = {}
    for target in plan.targets:
        key = (
            target.path.rsplit(".", 1)[-1] or "(the model itself)",
            target.host,
            target.layout.sizes(target.shapes),
            str(target.slot.r),
            f"{target.slot.alpha:g}",
            f"{target.slot.dropout:g}",
        )
        groups.setdefault(key, []).append(target)
    rows = [("layer", "class", "in -> out", "r", "alpha", "dropout", "layers", "parameters")]
    for key, members in groups.items():
        total = sum(member.parameters for member in members)
        rows.append((*key, str(len(members)), f"{total:,}"))
    for item in plan.trained:
        rows.append((item.path, item.host, "in full", "", "", "", "1", f"{item.parameters:,}"))
    if plan.biases:
        total, count = sum(item.parameters for item in plan.biases), len(plan.biases)
        rows.append(("bias", "others", "in full", "", "", "", str(count), f"{total:,}"))
    for item in plan.rows:
        what = f"{len(item.ids)} rows of {item.width}"
        rows.append((item.path, item.host, what, "", "", "", "1", f"{item.parameters:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    yield f"{plan.model}: {plan.base_parameters:,} parameters, {size(plan.base_bytes)}"
    for row in rows:
        yield "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
    share = 100 * plan.parameters / max(plan.base_parameters, 1)
    yield (
        f"trains {plan.parameters:,} parameters ({share:.2f} %): weights {size(plan.weight_bytes)},"
        f" gradients {size(plan.gradient_bytes)}, Adam {size(plan.adam_bytes)},"
        f" file {size(plan.file_bytes)}"
    )
    still = 100 * plan.untouched / max(plan.base_parameters, 1)
    yield f"untouched: {still:.1f} % of the base's parameters, in layers without an update"
    if plan.towers:
        each = (f"{t.path} {t.adapted} (of {t.layers} linear)" for t in plan.towers)
        yield f"layers with an update, by tower: {', '.join(each)}"
    yield from _choices(plan)
    if plan.per_rank:
        yield from _shares(plan)
    reasons: dict[str, list[str]] = {}
    for path, reason in plan.left_out.items():
        reasons.setdefault(reason, []).append(path)
    lines = [left_out_line(paths, reason) for reason, paths in reasons.items()]
    yield from (f"left out: {line}" for line in lines)
    yield from (f"warning: {line}" for line in plan.missed if line not in lines)
    if plan.fresh:
        names = ", ".join(plan.fresh)
        yield f"not in the checkpoint, so trained and saved with the adapter: {names}"
    if plan.frozen_norms:
        yield f"running statistics that are used and do not move: {some_paths(plan.frozen_norms)}"
    if plan.buffers:
        yield f"saved with the adapter if the training moves them: {some_paths(plan.buffers)}"
    for path, reason in plan.unfilled.items():
        yield f"not in the checkpoint, but neither trained nor saved: {path} ({reason})"
    yield from (f"warning: {warning}" for warning in plan.warnings)
    yield from (f"note: {note}" for note in plan.notes)
    yield from served_by(plan.vllm, plan.llama_cpp, {t.path: t.slot for t in plan.targets})
    yield from (f"PROBLEM: {problem}" for problem in plan.problems)


def _choices(plan: Plan) -> Iterable[str]:
    """Yield a line for each word among other targets; of one alone the table says it all."""
    for text, count in plan.matches.items():
        if text in WORDS and len(plan.matches) > 1:
            yield f"{text!r} means {count} of them"


def left_out_line(paths: Sequence[str], reason: str) -> str:
    """Return a line about layers that are left out for one reason."""
    return f"{some_paths(paths)} ({reason})"


def some_paths(paths: Sequence[str]) -> str:
    """Return the first of some paths and the number of the others."""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0] or 'the model itself'}{more}"


def served_by(
    vllm: Sequence[str], llama_cpp: Sequence[str], slots: Mapping[str, LayerConfig]
) -> Iterable[str]:
    """Yield a line for each client: that it can use the adapter, or why not."""
    if vllm:
        yield f"vLLM cannot serve it: {'; '.join(vllm)}"
    else:
        yield f"vLLM can serve it, started with --max-lora-rank {vllm_rank(slots)} or more"
    if llama_cpp:
        yield f"llama.cpp cannot use it: {'; '.join(llama_cpp)}"
    else:
        other = scaled_otherwise(slots)
        yield 'llama.cpp can use it, exported: hf_lora.export(..., client="llama.cpp")' + (
            "; its own convert_lora_to_gguf.py reads neither rsLoRA nor other alphas, without a "
            f"word, here of {some_paths(other)}"
            if other
            else ""
        )


def _shares(plan: Plan) -> Iterable[str]:
    """Yield a table of what each process keeps and sends."""
    yield f"each of {plan.world} processes, beside activations:"
    columns = "weights,gathered,gradients,Adam,on the CPU,sent a step,in full,a token,to save"
    rows: list[tuple[str, ...]] = [("", *columns.split(","))]
    for each in plan.per_rank:
        kept = (each.weights, each.gathered, each.gradients, each.optimizer, each.host)
        sent = (each.sent, each.sent_in_full, each.sent_per_token, each.sent_to_save)
        rows.append((each.strategy, *(size(number) if number else "-" for number in kept + sent)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()


def size(count: float) -> str:
    """Return a number of bytes as a person reads it: ``18.6 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
