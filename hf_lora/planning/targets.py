"""What the patterns of a configuration mean on a model: which modules, and why not the others."""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.config import ALL_LINEAR, LoRAConfig
from hf_lora.kinds.lora import LoRALayer
from hf_lora.kinds.table import host_fault, kind_of
from hf_lora.layers.kind import Adaptable
from hf_lora.layers.probe import host_class, is_packed
from hf_lora.layers.roles import Ties
from hf_lora.layers.tensor_parallel import split_fault
from hf_lora.layers.trained import tensor_names, train_fault
from hf_lora.layers.uncalled import reader_of, uncalled
from hf_lora.planning.heads import output_head
from hf_lora.planning.parts import Parts
from hf_lora.planning.stacked import Stack, meant_stacks, stacks
from hf_lora.planning.ties import Owners, followers
from hf_lora.planning.unfilled import find_unfilled
from hf_lora.targets import compile_target, inside, nearest

SWITCHED_OFF = "train=() says so"
"""Why a part that the checkpoint lacks does not train where the user knows that it does not."""

_MOST_NAMES = 8


@dataclasses.dataclass(frozen=True)
class Matches:
    """The modules that a configuration means."""

    chosen: tuple[str, ...]
    """Paths of the layers to adapt, in the model's order."""

    trained: tuple[str, ...]
    """Paths of the modules to train in full."""

    fresh: tuple[str, ...]
    """Those of them that nobody named: the checkpoint did not fill them."""

    unfilled: dict[str, str]
    """What else it did not fill, to why that does not train."""

    counts: dict[str, int]
    """Pattern to the number of layers that it means and that are adapted."""

    left_out: dict[str, str]
    """Path of a module that a pattern means but that is not adapted, to the reason."""

    unfit: tuple[str, ...]
    """Those of them that ``"all-linear"`` leaves out because they cannot do with an update."""

    stacks: tuple[Stack, ...]
    """The stacked parameters that a pattern means, and that no update reaches."""

    parts: dict[str, tuple[str, ...]]
    """Path of a chosen module whose parameters are adapted apart, to those that are."""

    ties: Ties
    """What follows a trained module, because the base ties the two."""

    overrides: dict[str, str]
    """Path of a chosen layer to the text of the override that holds for it."""

    notes: tuple[str, ...]


NOTHING = Matches(
    chosen=(),
    trained=(),
    fresh=(),
    unfilled={},
    counts={},
    left_out={},
    unfit=(),
    stacks=(),
    parts={},
    ties={},
    overrides={},
    notes=(),
)
"""Where a model cannot be looked at."""


def match(model: nn.Module, config: LoRAConfig, problems: list[str], owners: Owners) -> Matches:
    """Find out what ``config`` means on ``model``; what is wrong goes to ``problems``."""
    tree = Tree(model)
    named = tree.trained(config.train or (), problems)
    fresh, unfilled = tree.unfilled(config.train, named)
    trained = {path: None for path in named if not inside(path, fresh)} | dict.fromkeys(fresh)
    ties = owners.ties(trained)
    follow = followers(ties, trained)
    excluded = tree.excluded(config.exclude, problems)
    meant = tree.targets(config, problems)
    parts = tree.parts.meant(config, tree.meant)
    left_out: dict[str, str] = {}
    taken: set[str] = set()
    unfit: list[str] = []
    everything = config.targets == ALL_LINEAR
    for path in dict.fromkeys(path for paths in meant.values() for path in paths):
        reason = None
        if path in excluded:
            reason = f"excluded by {excluded[path]!r}"
        elif inside(path, trained):
            reason = "trained in full"
        elif path in follow:
            reason = f"tied with {follow[path]}, which is trained in full"
        elif path in parts and not parts[path]:
            reason = "its parameters are excluded"
        elif everything and path in tree.head:
            reason = "output head"
        elif everything:
            reason = tree.unfit(path, config)
            unfit += [path] if reason else []
        reason = reason or tree.reason(path)
        if reason is None:
            taken.add(path)
        elif tree.is_layer(path):
            left_out[path] = reason
            # the same on every process, and no pattern was meant to skip a layer for it
            if reason == split_fault(tree.modules[path]):
                problems.append(f"{path}: {reason}")
    chosen = tuple(path for path in tree.modules if path in taken)
    counts = {text: sum(path in taken for path in paths) for text, paths in meant.items()}
    if not chosen and not problems:
        problems.append("every matching layer is left out: " + _first(left_out))
    return Matches(
        chosen=chosen,
        trained=tuple(trained),
        fresh=tuple(fresh),
        unfilled=unfilled,
        counts=counts,
        left_out=left_out,
        unfit=tuple(unfit),
        stacks=tuple(
            stack
            for stack in tree.missed_stacks(config, {**excluded, **trained})
            if stack.path not in taken or stack.name not in parts.get(stack.path, ())
        ),
        parts={path: parts[path] for path in chosen if path in parts},
        ties=ties,
        overrides=tree.overrides(config, chosen, problems),
        notes=(
            *(
                f"{text!r} adapts nothing: all of it is left out"
                for text in counts
                if not counts[text]
            ),
            *(
                f"{other} is the same module as {path}"
                for other, path in tree.aliases.items()
                if path in taken
            ),
        ),
    )


class Tree:
    """A model's modules under every name that they have, and the questions patterns ask of them."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = dict(model.named_modules())
        first = {id(module): path for path, module in self.modules.items()}
        everything = model.named_modules(remove_duplicate=False)
        self.names = [(name, first[id(module)]) for name, module in everything]
        self.aliases = {name: path for name, path in self.names if name != path}
        """A further name of a module that stands in several places, to its first."""
        self.head = output_head(model)
        self.unheard = uncalled(self.modules)
        self.stacks = list(stacks(self.modules))
        self.parts = Parts(self.modules, self.names)
        self._meant: dict[str, list[str]] = {}
        self._reasons: dict[str, str | None] = {}
        self._fits: bool | None = None
        self._trials: dict[tuple, str | None] = {}

    def meant(self, text: str) -> list[str]:
        """Return the paths of the modules that a pattern means by any of their names."""
        if text not in self._meant:
            pattern = compile_target(text)
            found = dict.fromkeys(path for name, path in self.names if pattern.fullmatch(name))
            self._meant[text] = list(found)
        return self._meant[text]

    def layers_meant(self, text: str) -> list[str]:
        """Return the same, and the modules of which a pattern names a parameter."""
        named = self.parts.named(text)
        return list(dict.fromkeys([*self.meant(text), *named])) if named else self.meant(text)

    def reason(self, path: str) -> str | None:
        """Return why the module at ``path`` cannot be adapted, or None."""
        if path not in self._reasons:
            self._reasons[path] = self.unheard.get(path) or host_fault(self.modules[path])
        return self._reasons[path]

    def missed_stacks(self, config: LoRAConfig, settled: Collection[str]) -> list[Stack]:
        """Return the stacked parameters that the targets mean, outside of what is settled."""
        means_all = config.targets == ALL_LINEAR
        meant = self.stacks if means_all else meant_stacks(self.stacks, config.targets)
        spared = meant_stacks(meant, config.exclude)
        return [s for s in meant if s not in spared and not inside(s.path, settled)]

    def unfit(self, path: str, config: LoRAConfig) -> str | None:
        """Return why ``"all-linear"`` leaves a layer out, also one that may be named, or None."""
        module = self.modules[path]
        reason = self.reason(path)
        if reason is not None:
            return reason
        reader = reader_of(path, self.modules)
        if reader is not None:
            return f"{reader[0]}'s own code reads {reader[1]}.weight, past the layer"
        # what is packed is tried when it is wrapped, once it is no longer packed for inference
        fault = None if is_packed(module) else self._trial(module)
        small = not self._has_own_rank(path, config) and self._rank_fault(path, config.r)
        if fault is None and small and self._some_take(config):
            return f"smaller than r={config.r}"
        return fault

    def _has_own_rank(self, path: str, config: LoRAConfig) -> bool:
        said = (fields for text, fields in config.overrides.items() if path in self.meant(text))
        return "r" in next(said, {})

    def _some_take(self, config: LoRAConfig) -> bool:
        """Say whether the rank fits some layer at all: if not, it is the rank that is wrong."""
        if self._fits is None:
            self._fits = any(
                not self._rank_fault(path, config.r)
                for path in self.linear
                if path not in self.head and not self._has_own_rank(path, config)
            )
        return self._fits

    def _rank_fault(self, path: str, r: int) -> str | None:
        kind = kind_of(self.modules[path])
        return kind and kind.lora_rank_fault(self.modules[path], r)

    def _trial(self, module: nn.Module) -> str | None:
        kind = kind_of(module)
        key = kind and kind.lora_probe_key(module)
        if kind is None or key is None:
            return None
        if (kind, *key) not in self._trials:
            self._trials[kind, *key] = kind.lora_gradient_fault(module)
        return self._trials[kind, *key]

    def is_layer(self, path: str) -> bool:
        """Say whether a module has something of its own to adapt, and is not a mere container."""
        module = self.modules[path]
        return kind_of(module) is not None or bool(tensor_names(module))

    @functools.cached_property
    def linear(self) -> list[str]:
        """The paths of everything that declares itself to be a linear layer."""
        return [path for path, module in self.modules.items() if LoRALayer.lora_takes(module)]

    def targets(self, config: LoRAConfig, problems: list[str]) -> dict[str, list[str]]:
        """Return each target pattern and the modules that it means."""
        if config.targets == ALL_LINEAR:
            if not self.linear:
                problems.append(f"{ALL_LINEAR!r} matches nothing: the model has no linear layer")
            return {ALL_LINEAR: self.linear}
        meant = {text: self.layers_meant(text) for text in config.targets}
        some = any(meant.values())
        for text, paths in meant.items():
            # the name that an expert's own layer had is told beside others, and no typo
            if not paths and some and meant_stacks(self.stacks, [text]):
                continue
            if not paths:
                problems.append(self._no_match(text))
            elif all(self.reason(path) for path in paths):
                shown = next((path for path in paths if self.is_layer(path)), paths[0])
                problems.append(
                    f"{text!r} matches only modules that cannot be adapted "
                    f"({len(paths)}; {shown or 'the model itself'}: {self.reason(shown)})"
                )
        return meant

    def excluded(self, patterns: Iterable[str], problems: list[str]) -> dict[str, str]:
        """Return the paths that are excluded, each with the pattern that does it."""
        found: dict[str, str] = {}
        for text in patterns:
            paths = self.meant(text)
            if not self.layers_meant(text):
                problems.append(f"exclude {text!r} matches no module; {self._near(text)}")
            for path in paths:
                found.setdefault(path, text)
        return found

    def overrides(
        self, config: LoRAConfig, chosen: tuple[str, ...], problems: list[str]
    ) -> dict[str, str]:
        """Return the paths for which an override holds: the first pattern that means them."""
        found: dict[str, str] = {}
        layers = set(chosen)
        for text in config.overrides:
            meant = [path for path in self.meant(text) if path in layers]
            apart = [p for p in self.layers_meant(text) if p in layers and p not in meant]
            if apart:
                problems.append(
                    f"overrides {text!r} names a parameter of {apart[0]} ({len(apart)} in all); "
                    "those of one layer of experts have the same numbers: name the layer"
                )
            elif not meant:
                problems.append(
                    f"overrides {text!r} matches none of the adapted layers; {self._near(text)}"
                )
            elif all(path in found for path in meant):
                problems.append(
                    f"overrides {text!r} is never used: earlier patterns take its layers"
                )
            for path in meant:
                found.setdefault(path, text)
        return found

    def trained(self, patterns: Iterable[str], problems: list[str]) -> dict[str, None]:
        """Return the topmost modules that are trained in full."""
        found: dict[str, None] = {}
        for text in patterns:
            meant = [path for path in self.meant(text) if path]
            filled = [p for p in meant if next(self.modules[p].parameters(), None) is not None]
            if not filled:
                what = "only modules without parameters" if meant else "no module"
                problems.append(f"train {text!r} matches {what}; {self._near(text, self.modules)}")
            found |= dict.fromkeys(filled)
        tops = {path: None for path in found if not inside(path.rpartition(".")[0], found)}
        for top in tops:
            for below, module in self.modules[top].named_modules():
                fault = train_fault(module)
                if fault:
                    path = f"{top}.{below}" if below else top
                    problems.append(f"train: {path} cannot be trained in full: {fault}")
        return tops

    def unfilled(
        self, patterns: Sequence[str] | None, named: Collection[str]
    ) -> tuple[list[str], dict[str, str]]:
        """Return what trains because the checkpoint lacks it, and why other such parts do not.

        Args:
            patterns: What the configuration says to train; ``()`` means nothing at all.
            named: The modules that it names.
        """
        found = find_unfilled(self.model, self.head)
        left = {path: why for path, why in found.other.items() if not inside(path, named)}
        fresh = []
        for path in found.needed:
            if inside(path, named):
                continue
            fault = SWITCHED_OFF if patterns == () else self._train_fault(path)
            if fault:
                left[path] = fault
            else:
                fresh.append(path)
        return fresh, left

    def _train_fault(self, top: str) -> str | None:
        for module in self.modules[top].modules():
            fault = train_fault(module)
            if isinstance(module, Adaptable):
                fault = "another adapter has a low-rank update there"
            if fault:
                return fault
        return None

    def _no_match(self, text: str) -> str:
        pattern = compile_target(text)
        for path, module in self.modules.items():
            for name, tensor in module._parameters.items():
                full = _full(path, name)
                if tensor is not None and not is_lazy(tensor) and pattern.fullmatch(full):
                    host = host_class(module).__name__
                    return (
                        f"{text!r} means the parameter {full} of shape {tuple(tensor.shape)}, not "
                        f"a layer, and {host} does not declare to transformers how it computes "
                        "with it, as experts do that can be adapted (experts.down_proj)"
                    )
        return f"{text!r} matches no module; {self._near(text)}"

    def _near(self, text: str, paths: Iterable[str] | None = None) -> str:
        paths = self.linear if paths is None else paths
        near = nearest(text, paths) or sorted({path.rsplit(".", 1)[-1] for path in paths} - {""})
        if not near:
            return "the model has no linear layer at all"
        return f"near: {', '.join(near[:_MOST_NAMES])}"


def _full(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _first(left_out: dict[str, str]) -> str:
    path, reason = next(iter(left_out.items()), ("", "nothing matches"))
    return f"{path} ({reason})" if path else reason
