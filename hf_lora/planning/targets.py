"""What the patterns of a configuration mean on a model: which modules, and why not the others."""

import dataclasses

from torch import nn

from hf_lora.config import ALL_LINEAR, WORDS, LoRAConfig
from hf_lora.layers.roles import Ties
from hf_lora.layers.tensor_parallel import split_fault
from hf_lora.layers.token_rows import TokenRows
from hf_lora.planning.stacked import Stack
from hf_lora.planning.ties import Owners, followers
from hf_lora.planning.token_rows import match_rows
from hf_lora.planning.towers import Tower, find_towers, unnamed
from hf_lora.planning.tree import Tree
from hf_lora.targets import inside


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
    """Those of them that a word leaves out because they cannot do with an update."""

    stacks: tuple[Stack, ...]
    """The stacked parameters that a pattern means, and that no update reaches."""

    parts: dict[str, tuple[str, ...]]
    """Path of a chosen module whose parameters are adapted apart, to those that are."""

    ties: Ties
    """What follows a trained module, because the base ties the two."""

    rows: dict[str, TokenRows]
    """Path of each module of which some rows train, to these."""

    overrides: dict[str, str]
    """Path of a chosen layer to the text of the override that holds for it."""

    unseen: tuple[str, ...]
    """A line for each layer, or for several, of which an update may not be seen."""

    towers: tuple[Tower, ...]
    """The model's towers, and how many layers of each get an update."""

    silent: tuple[str, ...]
    """A line for each tower that gets none, and of which nothing is said."""

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
    rows={},
    overrides={},
    unseen=(),
    towers=(),
    silent=(),
    notes=(),
)
"""Where a model cannot be looked at."""


def match(model: nn.Module, config: LoRAConfig, problems: list[str], owners: Owners) -> Matches:
    """Find out what ``config`` means on ``model``; what is wrong goes to ``problems``."""
    tree = Tree(model)
    in_full = tree.trained(config.train or (), problems)
    fresh, unfilled = tree.unfilled(config.train, in_full)
    trained = {path: None for path in in_full if not inside(path, fresh)} | dict.fromkeys(fresh)
    ties = owners.ties(trained)
    follow = followers(ties, trained)
    rows, wrong = match_rows(tree, config, owners)
    problems += wrong
    excluded = tree.excluded(config.exclude, problems)
    meant = tree.targets(config, problems)
    parts = tree.parts.meant(config, tree.meant)
    left_out: dict[str, str] = {}
    taken: set[str] = set()
    unfit: list[str] = []
    named = {path for text, paths in meant.items() if text not in WORDS for path in paths}
    told = {path for text, paths in meant.items() if text != ALL_LINEAR for path in paths}
    for path in dict.fromkeys(path for paths in meant.values() for path in paths):
        reason = None
        if path in excluded:
            reason = f"excluded by {excluded[path]!r}"
        elif inside(path, trained):
            reason = "trained in full"
        elif path in follow:
            reason = f"tied with {follow[path]}, which is trained in full"
        elif path in rows:
            reason = "rows of it are trained"
        elif path in parts and not parts[path]:
            reason = "its parameters are excluded"
        elif path not in named and path in tree.head:
            reason = "output head"
        elif path not in named:
            expert = path in tree.experts and path not in told
            reason = "one of several experts, which 'experts' means" if expert else None
            reason = reason or tree.unfit(path, config)
            unfit += [path] if reason else []
        reason = reason or tree.reason(path)
        if reason is None:
            taken.add(path)
        elif tree.is_layer(path):
            left_out[path] = reason
            # the same on every process, and no pattern was meant to skip a layer for it
            if reason == split_fault(tree.modules[path]):
                problems.append(f"{path}: {reason}")
    for path in tree.last_of_attention(taken):
        if path not in excluded and not inside(path, trained):
            taken.add(path)
            left_out.pop(path, None)
    chosen = tuple(path for path in tree.modules if path in taken)
    counts = {text: sum(path in taken for path in paths) for text, paths in meant.items()}
    if not chosen and not problems and config.targets:
        names = [] if named else tree.nameable()
        way = f"; patterns can name {', '.join(names)}" if names else ""
        problems.append(f"every matching layer is left out: {_first(left_out)}{way}")
    towers = find_towers(tree.modules, tree.linear, [*chosen, *trained])
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
        rows=rows,
        overrides=tree.overrides(config, chosen, problems),
        unseen=tuple(tree.unseen([*chosen, *rows])),
        towers=towers,
        silent=tuple(unnamed(towers, config, tree.linear)),
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


def _first(left_out: dict[str, str]) -> str:
    path, reason = next(iter(left_out.items()), ("", "nothing matches"))
    return f"{path} ({reason})" if path else reason
