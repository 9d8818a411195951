"""A model's modules under every name that they have, and the questions patterns ask of them."""

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.config import ALL_LINEAR, EXPERTS, WORDS, LoRAConfig
from hf_lora.kinds.lora import LoRALayer
from hf_lora.kinds.table import host_fault, kind_of
from hf_lora.kinds.token_rows import TrainedRows
from hf_lora.layers.kind import Adaptable
from hf_lora.layers.probe import host_class, is_packed
from hf_lora.layers.reading import out_projections
from hf_lora.layers.trained import tensor_names, train_fault
from hf_lora.layers.uncalled import kept_past, reader_of, reason_kept_past, uncalled
from hf_lora.planning.heads import output_head
from hf_lora.planning.parts import Parts, texts_of
from hf_lora.planning.stacked import Stack, meant_stacks, stacks
from hf_lora.planning.structure import Structure
from hf_lora.planning.ties import full_name
from hf_lora.planning.unfilled import find_unfilled
from hf_lora.targets import compile_target, inside, nearest

SWITCHED_OFF = "train=() says so"
"""Why a part that the checkpoint lacks does not train where the user knows that it does not."""

_MOST_NAMES = 8
_MEANT_AS_LINEAR = {ALL_LINEAR, "mlp"}
"""Words by which people mean experts as well, where these are linear layers."""

_MISSING = {
    ALL_LINEAR: "no linear layer",
    "attention": "no attention that is made of linear layers",
    "mlp": "no feed-forward network of linear layers in a block, beside those of experts",
    EXPERTS: "no experts that can be adapted",
}


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
        self._kept_past = kept_past(self.modules)
        self.stacks = list(stacks(self.modules))
        self.parts = Parts(self.modules, self.names)
        self._meant: dict[str, list[str]] = {}
        self._reasons: dict[str, str | None] = {}
        self._fits: bool | None = None
        self._trials: dict[tuple, str | None] = {}

    def meant(self, text: str) -> list[str]:
        """Return the paths of the modules that a word or a pattern means, in order."""
        if text in WORDS:
            return self.word(text)
        if text not in self._meant:
            self._meant[text] = self.named(text)
        return self._meant[text]

    def named(self, text: str) -> list[str]:
        """Return the paths of the modules that a pattern means by any of their names."""
        pattern = compile_target(text)
        return list(dict.fromkeys(path for name, path in self.names if pattern.fullmatch(name)))

    @functools.cached_property
    def _structure(self) -> Structure:
        return Structure(self.modules, self.linear)

    def word(self, word: str) -> list[str]:
        """Return the paths of the modules that a word means on this model."""
        if word == ALL_LINEAR:
            return self.linear
        if word == EXPERTS:
            return [path for path in self.modules if path in self.experts or path in self.parts.of]
        return self._structure.attention if word == "attention" else self._structure.mlp

    @functools.cached_property
    def experts(self) -> set[str]:
        """The linear layers that experts have each for themselves."""
        return {*self._structure.experts} - self.parts.of.keys()

    def layers_meant(self, text: str) -> list[str]:
        """Return the same, and the modules of which a pattern names a parameter."""
        named = self.parts.named(text)
        return list(dict.fromkeys([*self.meant(text), *named])) if named else self.meant(text)

    def reason(self, path: str) -> str | None:
        """Return why the module at ``path`` cannot be adapted, or None."""
        if path not in self._reasons:
            self._reasons[path] = self.unheard.get(path) or host_fault(self.modules[path])
        return self._reasons[path]

    def last_of_attention(self, paths: Collection[str]) -> list[str]:
        """Return the paths of the last layers of those of the paths that are an attention."""
        outs = out_projections(self.modules, self.modules)
        return [out for out, attention in outs.items() if attention in paths]

    def unseen(self, chosen: Collection[str]) -> Iterator[str]:
        """Yield a line for targeted layers of which an update may not be seen, here or in PEFT."""
        for path in chosen:
            if (kept_by := self._kept_past.get(id(self.modules[path]))) is not None:
                yield f"{path}: {reason_kept_past(kept_by)}"
        found: dict[tuple[str, str], list[str]] = {}
        for path in chosen:
            reader = reader_of(path, self.modules)
            if reader is not None:
                found.setdefault(reader, []).append(path)
        for (parent, child), paths in found.items():
            yield (
                f"{paths[0]} ({len(paths)} in all): {parent}'s own code reads {child}.weight; "
                "where it does that instead of calling the layer, an update has no effect"
            )

    def missed_stacks(self, config: LoRAConfig, settled: Collection[str]) -> list[Stack]:
        """Return the stacked parameters that the targets mean, outside of what is settled."""
        texts = texts_of(config)
        means_all = not _MEANT_AS_LINEAR.isdisjoint(texts)
        meant = self.stacks if means_all else meant_stacks(self.stacks, texts)
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
        if id(module) in self._kept_past:
            return reason_kept_past(self._kept_past[id(module)])
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
        meant = {text: self.layers_meant(text) for text in texts_of(config)}
        some = any(meant.values())
        for text, paths in meant.items():
            # the name that an expert's own layer had is told beside others, and no typo
            if not paths and some and meant_stacks(self.stacks, [text]):
                continue
            if not paths:
                problems.append(self._no_match(text))
            elif text in WORDS:
                continue  # what it leaves out is told
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
            meant = [path for path in self.named(text) if path]
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
            if isinstance(module, TrainedRows):
                fault = "another adapter trains rows of it"
            if fault:
                return fault
        return None

    def _no_match(self, text: str) -> str:
        if text in WORDS:
            return self._no_word(text)
        pattern = compile_target(text)
        for path, module in self.modules.items():
            for name, tensor in module._parameters.items():
                full = full_name((path, name))
                if tensor is not None and not is_lazy(tensor) and pattern.fullmatch(full):
                    host = host_class(module).__name__
                    return (
                        f"{text!r} means the parameter {full} of shape {tuple(tensor.shape)}, not "
                        f"a layer, and {host} does not declare to transformers how it computes "
                        "with it, as experts do that can be adapted (experts.down_proj)"
                    )
        return f"{text!r} matches no module; {self._near(text)}"

    def _no_word(self, word: str) -> str:
        """Return that a word means nothing here, and what else there is."""
        found = f"{word!r} matches nothing: the model has {_MISSING[word]}"
        others = [other for other in WORDS if other != word and self.word(other)]
        if word == EXPERTS and self.stacks:
            first = self.stacks[0]
            host = host_class(self.modules[first.path]).__name__
            found += f" ({host} does not declare how it computes with {first.full_name})"
        if word == ALL_LINEAR:
            others = [*others, *self.nameable()]
        means = f"; here mean something: {', '.join(map(repr, others))}" if others else ""
        of_that_name = self.named(word)
        way = f"; {of_that_name[0]} is meant by {f'.*{word}'!r}" if of_that_name else ""
        return found + means + way

    def nameable(self) -> list[str]:
        """Return the last names of some layers that a pattern can mean."""
        found = (path for path in self.modules if path and self.reason(path) is None)
        last = dict.fromkeys(path.rpartition(".")[2] for path in found)
        return [name for name in last if not name.isdigit()][:_MOST_NAMES]

    def _near(self, text: str, paths: Iterable[str] | None = None) -> str:
        paths = self.linear if paths is None else paths
        near = nearest(text, paths) or sorted({path.rsplit(".", 1)[-1] for path in paths} - {""})
        if not near:
            return "the model has no linear layer at all"
        return f"near: {', '.join(near[:_MOST_NAMES])}"
