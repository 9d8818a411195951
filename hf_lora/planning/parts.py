"""Modules whose parameters are adapted apart, as stacks of experts are, and the names of these."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.kinds.table import kind_of
from hf_lora.targets import compile_target


def parts_of(module: nn.Module) -> tuple[str, ...]:
    """Return the parameters of a module that are adapted apart."""
    kind = kind_of(module)
    return () if kind is None else kind.lora_parts(module)


def texts_of(config: LoRAConfig) -> tuple[str, ...]:
    """Return the targets of a configuration one by one."""
    return (config.targets,) if isinstance(config.targets, str) else tuple(config.targets)


class Parts:
    """The modules of a model whose parameters are adapted apart, under every name they have."""

    def __init__(self, modules: Mapping[str, nn.Module], names: Iterable[tuple[str, str]]):
        self.of = {path: parts for path, module in modules.items() if (parts := parts_of(module))}
        """Path of each such module to the names of these parameters."""

        self._names = [(name, path) for name, path in names if path in self.of]

    def named(self, text: str) -> list[str]:
        """Return the paths of the modules of which a pattern names a parameter."""
        found = (p for name, p in self._names if any(_names(text, name, x) for x in self.of[p]))
        return list(dict.fromkeys(found))

    def meant(
        self, config: LoRAConfig, modules: Callable[[str], Collection[str]]
    ) -> dict[str, tuple[str, ...]]:
        """Return which parameters of each such module are to be adapted.

        Args:
            config: What is wanted.
            modules: The paths of the modules that a pattern means by their own names.
        """
        targets, found = texts_of(config), {}
        for path in self.of:
            spared = self._of(path, config.exclude, modules)
            meant = self._of(path, targets, modules)
            found[path] = tuple(part for part in meant if part not in spared)
        return found

    def _of(
        self, path: str, texts: Sequence[str], modules: Callable[[str], Collection[str]]
    ) -> tuple[str, ...]:
        if any(path in modules(text) for text in texts):
            return self.of[path]
        names = [name for name, first in self._names if first == path]
        return tuple(
            part
            for part in self.of[path]
            if any(_names(text, name, part) for text in texts for name in names)
        )


def _names(text: str, path: str, part: str) -> bool:
    """Say whether a pattern names a parameter, and not only what dense layers are called, too."""
    pattern = compile_target(text)
    full = f"{path}.{part}" if path else part
    return pattern.fullmatch(full) is not None and pattern.fullmatch(part) is None
