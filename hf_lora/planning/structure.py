"""What the words ``attention``, ``mlp`` and ``experts`` mean on a model, told from its structure.

No list of architectures: a module says by its class or by its name that it is attention or a
feed-forward network, and where it stands decides the rest. A block whose name speaks of attention
(``MllamaCrossAttentionDecoderLayer``) holds both, so what is told of a part goes before that.
"""

import collections
import functools
import re
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from hf_lora.layers.hosts import features
from hf_lora.layers.probe import host_class
from hf_lora.targets import parents

_ATTENTION_CLASS = re.compile(r"Att(entio)?n")
_ATTENTION_NAME = re.compile(r"(^|_)(attn|attentions?)(_|$)|attn$")
_MLP_CLASS = re.compile(r"MLP|Mlp|Feed_?Forward|FFN|Ffn|FFW|Dense(Gated)?Act|Intermediate")
_MLP_NAME = re.compile(
    r"(^|_)(mlps?|ffn?|ffwd?|feed_?forward|intermediate|(fc|linear|lin|dense|wi|pwconv)_?\d+)"
    r"(_|$|\d)"
)
_NORM_CLASS = re.compile(r"Norm$")
_ROUTER_CLASS = re.compile(r"Router|Gating")
_EXPERTS_NAME = re.compile(r"(^|_)experts?$")
_LISTS = (nn.ModuleList, nn.ModuleDict)


class Structure:
    """The linear layers of a model, by what they are part of.

    Args:
        modules: Path to module, for all of the model.
        linear: Paths of the linear layers among them, in order.
    """

    def __init__(self, modules: Mapping[str, nn.Module], linear: Collection[str]):
        self._modules = modules
        self._linear = list(linear)
        self._is_linear = set(linear)

    @functools.cached_property
    def experts(self) -> list[str]:
        """Those of experts that have layers of their own; stacked ones are no linear layers."""
        return [path for path in self._linear if self._is_expert(path)]

    @functools.cached_property
    def attention(self) -> list[str]:
        """Projections into attention and out of it, and what else is inside of it."""
        found = self._attention(self._networks)
        return [path for path in self._linear if path in found]

    @functools.cached_property
    def mlp(self) -> list[str]:
        """Layers of feed-forward networks in blocks, those of shared experts included.

        Neither routers nor heads and projectors outside of blocks.
        """
        others = {*self.attention, *self.experts}
        return [
            path
            for path, network in self._networks.items()
            if path not in others and self._stands_in_a_block(network) and not self._routes(path)
        ]

    @functools.cached_property
    def _classes(self) -> dict[str, str]:
        return {path: host_class(module).__name__ for path, module in self._modules.items()}

    @functools.cached_property
    def _below(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = collections.defaultdict(list)
        for path in self._linear:
            for above in _above(path):
                found[above].append(path)
        return found

    def _says_attention(self, path: str) -> bool:
        return path not in self._is_linear and bool(
            _ATTENTION_CLASS.search(self._classes[path]) or _ATTENTION_NAME.search(_last(path))
        )

    def _says_mlp(self, path: str) -> bool:
        by_class = path not in self._is_linear and _MLP_CLASS.search(self._classes[path])
        return bool(by_class or _MLP_NAME.search(_last(path)))

    @functools.cached_property
    def _networks(self) -> dict[str, str]:
        """Return each layer of a feed-forward network, to the path of what says that it is one."""
        found: dict[str, str] = {}
        for path in self._linear:
            for above in (path, *parents(path)):
                if self._says_mlp(above):
                    if not self._is_in_a_norm(path, above):
                        found[path] = above
                    break
                if self._says_attention(above):
                    break
        # as in BERT's blocks: one layer alone says that it widens, the next one takes that back
        for path, after in zip(self._linear, self._linear[1:], strict=False):
            alone = path in found and (found[path] == path or len(self._below[found[path]]) == 1)
            if alone and after not in found and self._takes_back(path, after):
                found[after] = after.rpartition(".")[0]
        return {path: found[path] for path in self._linear if path in found}

    def _is_in_a_norm(self, path: str, network: str) -> bool:
        """Say whether a network makes the scale of an adaptive norm."""
        around = next(parents(network), "")
        inside = [above for above in (path, *parents(path)) if len(above) >= len(around)]
        return any(_NORM_CLASS.search(self._classes[above]) for above in inside)

    def _takes_back(self, path: str, after: str) -> bool:
        made, read = features(self._modules[path]), features(self._modules[after])
        same_block = _block(path) == _block(after)
        return same_block and made is not None and read is not None and made[1] == read[0]

    def _attention(self, networks: Mapping[str, str]) -> set[str]:
        """Return the layers of attention, from the inside out.

        What is around attention and speaks of it belongs to it, such as BERT's output projection,
        unless it has a feed-forward network beside it.
        """
        inner: dict[str, set[str]] = collections.defaultdict(set)
        deepest_first = sorted((p for p in self._below if p), key=lambda p: -p.count("."))
        for path in deepest_first:
            found = inner[path]
            if self._says_attention(path):
                rest = [layer for layer in self._below[path] if layer not in found]
                if not found or not any(layer in networks for layer in rest):
                    found = set(self._below[path])
            inner[path.rpartition(".")[0] if "." in path else ""] |= found
        return inner[""]

    def _stands_in_a_block(self, network: str) -> bool:
        """Say whether it is inside of a numbered block, or has attention right beside it."""
        above, _, _ = network.rpartition(".")
        if any(_last(path).isdigit() for path in parents(network)):
            return True
        beside = (f"{above}.{name}" for name in self._children(above))
        return bool(above) and any(map(self._says_attention, beside))

    def _children(self, path: str) -> Iterator[str]:
        module = self._modules.get(path)
        return iter(()) if module is None else (name for name, _ in module.named_children())

    def _routes(self, path: str) -> bool:
        """Say whether a layer chooses among experts, or weighs one."""
        sizes = features(self._modules[path])
        said = any(
            _ROUTER_CLASS.search(self._classes[above]) or "router" in _last(above)
            for above in (path, *parents(path))
        )
        return said or (sizes is not None and sizes[1] == 1)

    def _is_expert(self, path: str) -> bool:
        return any(
            isinstance(self._modules[above], _LISTS)
            and _EXPERTS_NAME.search(_last(above))
            and "shared" not in _last(above)
            for above in parents(path)
        )


def _above(path: str) -> Iterator[str]:
    yield from parents(path)
    if path:
        yield ""


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _block(path: str) -> str | None:
    """Return the numbered block around a layer."""
    return next((above for above in parents(path) if _last(above).isdigit()), None)
