"""``extract``: an adapter from a base and a model that was fine-tuned in full."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.save import as_dtype, collect
from hf_lora.algebra.assemble import check_finite, pattern_of
from hf_lora.algebra.method import SVD, checked
from hf_lora.algebra.pair import Change, Pair, Source, bare_model, open_checkpoint
from hf_lora.algebra.record import DerivedAdapter, relative
from hf_lora.compat.transformers import mark_filled
from hf_lora.config import LoRAConfig
from hf_lora.errors import BaseLoadError, ConfigError, TargetError, listing
from hf_lora.files.data import AdapterData
from hf_lora.files.patterns import endings
from hf_lora.functional.decompose import padded
from hf_lora.functional.low_rank import Product
from hf_lora.functional.randomized import distance, largest_product
from hf_lora.kinds.embedding import LoRAEmbedding
from hf_lora.kinds.table import host_fault, kind_of, layer_class
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import DEFAULT
from hf_lora.layers.roles import OWN_BIAS
from hf_lora.layers.trained import train_fault
from hf_lora.model.patch import patch
from hf_lora.model.registry import registry_of
from hf_lora.planning.heads import output_head
from hf_lora.planning.records import size, some_paths
from hf_lora.targets import inside, parents, shortest_names

_LARGE = 64 * 2**20
"""From how many bytes on a tensor that is carried in full is worth a line."""


def extract(
    base: Source,
    tuned: Source,
    rank: int | None = None,
    *,
    energy: float | None = None,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> DerivedAdapter:
    """Make an adapter of what a full fine-tuning has changed.

    Both checkpoints are read tensor by tensor, from files or file by file from the Hub, with one
    tensor of each in memory; what stays is the adapter. Of linear layers, convolutions without
    groups and experts the change is taken as the nearest product of a rank (randomized SVD with
    power iteration, arXiv 0909.4061). Biases of these layers, and whatever else has changed (norms,
    embeddings, output heads, new heads, other parameters), are kept in full, as modules that were
    trained; buffers that moved as such. Nothing that has changed is left out.

    Args:
        base: Folder of the base model, or its id on the Hub.
        tuned: Likewise, what was made of it: of the same architecture, perhaps with another head or
            with more tokens.
        rank: Highest rank of a layer.
        energy: Share of each layer's squared norm to keep, above 0 and at most 1.
        seed: Of the random spaces.
        dtype: Type of the adapter's tensors; by default that of the tuned model's.
        base_revision: Branch, tag or commit of the base on the Hub.
        revision: Of the tuned one.
        token: For private repos.
        trust_remote_code: Whether to run code that came with the tuned model.

    Returns:
        The adapter: ``.energy`` is what each layer keeps, ``.error`` what it loses, rounding
        included, ``.told`` what is kept in full.

    Raises:
        ConfigError: Neither ``rank`` nor ``energy`` is given, or an argument makes no sense.
        BaseLoadError: One is no sound checkpoint, or they are of different architectures.
        TargetError: Something that has changed can be no part of an adapter.
        HubError: The Hub refused or could not be reached.
    """
    if rank is None and energy is None:
        raise ConfigError("Say how much to keep: rank=32, or energy=0.9 of what each layer changed")
    checked(SVD, rank=rank, energy=energy, seed=seed)
    own = as_dtype(dtype)
    there = open_checkpoint(base, base_revision, token)
    here = open_checkpoint(tuned, revision, token)
    kinds = [side.config.get("model_type") for side in (there, here)]
    if kinds[0] != kinds[1]:
        raise BaseLoadError(
            f"{there.name} is a {kinds[0]} and {here.name} a {kinds[1]}: not of one architecture"
        )
    model = bare_model(here, trust_remote_code=trust_remote_code)
    pair = Pair(there, here, model)
    task = _Extraction(pair, rank, energy, seed, own)
    with torch.no_grad():
        task.read()
        data = task.collected(there.name, base_revision)
    asked = [f"rank {rank}"] if rank is not None else []
    asked += [f"{energy:.6g} of the energy"] if energy is not None else []
    title = f"{here.name} - {there.name}, extracted at {' and '.join(asked)}"
    return DerivedAdapter(
        title, data, relative(task.lost, task.norms), task.norms, tuple(task.told())
    )


class _Extraction:
    """What was found in two checkpoints, on the way to an adapter."""

    def __init__(
        self,
        pair: Pair,
        rank: int | None,
        energy: float | None,
        seed: int,
        dtype: torch.dtype | None,
    ):
        self.pair = pair
        self.model: Any = pair.model
        self.how = (rank, energy, seed)
        self.dtype = dtype
        self.modules = dict(self.model.named_modules())
        self.heads = output_head(self.model)
        self.products: dict[str, dict[str, Product]] = {}
        """Path of a layer and name of its parameter to the change, in that one's own layout."""

        self.stacks: set[str] = set()
        """Paths of those that have a matrix for each expert."""

        self.lost: dict[str, float] = {}
        self.norms: dict[str, float] = {}
        self.biased: set[str] = set()
        self.full: dict[str, torch.Tensor] = {}
        """Name of what is kept in full to what the tuned model has there."""

        self.buffers: dict[str, torch.Tensor] = {}
        self.fresh: list[str] = []

    def read(self) -> None:
        """Go through both checkpoints, and keep of each change what the adapter will have."""
        for change in self.pair.changes():
            path, _, role = change.name.rpartition(".")
            module = self.modules[path]
            if not bool(change.after.isfinite().all()):
                raise BaseLoadError(f"{change.name} of the tuned model has numbers not finite")
            if role in module._buffers:
                self.buffers[change.name] = change.after
            elif change.before is None:
                self.fresh.append(change.name)
                self.full[change.name] = change.after
            elif self._is_low_rank(path, role):
                self._decompose(change, path, role)
            elif role == OWN_BIAS and self._is_low_rank(path, "weight"):
                self.biased.add(path)
            else:
                self.full[change.name] = change.after
        if not self.products and not self.biased:
            what = "only in what is kept in full" if self.full else "in nothing"
            raise TargetError(f"These two checkpoints differ {what}: there is no layer to adapt")

    def _is_low_rank(self, path: str, role: str) -> bool:
        """Say whether a parameter gets a product instead of a copy."""
        module = self.modules[path]
        kind = kind_of(module)
        if kind is None or path in self.heads or host_fault(module) is not None:
            return False
        if issubclass(kind, LoRAEmbedding) or kind.lora_layout.join is None:
            return False
        made = layer_class(module)
        if made.lora_product_fault(module) is not None:
            return False
        return role in (made.lora_parts(module) or made.lora_weights)

    def _decompose(self, change: Change, path: str, role: str) -> None:
        assert change.before is not None
        module = self.modules[path]
        if layer_class(module).lora_parts(module):
            self.stacks.add(path)
        rank, energy, seed = self.how
        wide = torch.promote_types(change.after.dtype, torch.float32)
        delta = change.after.to(wide) - change.before.to(wide)
        matrix = delta if path in self.stacks else delta.flatten(1)[None]
        digest = hashlib.sha256(f"{seed}:{change.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        found = largest_product(matrix, rank, energy, generator=generator)
        own = self.dtype or change.after.dtype
        found = Product(found.left.to(own), found.right.to(own))
        norm, lost = distance(matrix, found)
        self.products.setdefault(path, {})[role] = found
        self.norms[path] = float(torch.tensor([self.norms.get(path, 0.0), norm]).norm())
        self.lost[path] = float(torch.tensor([self.lost.get(path, 0.0), lost]).norm())

    def collected(self, base: str, revision: str | None) -> AdapterData:
        """Return all that is written.

        Raises:
            TargetError: Something that has changed can be no part of an adapter.
        """
        tops = self._tops()
        layers = {**dict.fromkeys(self.products), **dict.fromkeys(sorted(self.biased))}
        layers = {path: None for path in layers if not inside(path, tops)}
        if not layers:
            raise TargetError("All that differs is kept in full: there is no layer to adapt")
        ranks = {path: self._rank(path) for path in layers}
        self._fill(tops)
        for path in layers if self.biased else ():
            self._stand_in(path)
        patch(self.model, LoRAConfig(**self._fields(layers, ranks, tops)), DEFAULT)
        registry = registry_of(self.model)
        tensors = dict(self.model.state_dict())
        for path, role, key in registry.keys(DEFAULT):
            if path in layers:
                tensors[key] = self._tensor(path, role, ranks[path])
        self.model.config._name_or_path = ""  # it is no model that could be compared with files
        data = collect(self.model, registry, DEFAULT, self.dtype, tensors, base)
        check_finite(data.tensors)
        moved = {f"base_model.model.{name}": tensor for name, tensor in self.buffers.items()}
        for path in set(self.lost) - set(layers):
            del self.lost[path], self.norms[path]
        return dataclasses.replace(
            data,
            tensors=data.tensors | moved,
            buffers=tuple(sorted(self.buffers)),
            fingerprint=self.pair.base.fingerprint(tops, [*self.fresh]),
            base_changed={},
            revision=revision,
        )

    def _fields(
        self, layers: Iterable[str], ranks: Mapping[str, int], tops: list[str]
    ) -> dict[str, Any]:
        """Return the configuration that an adapter of these layers has been trained by."""
        names = []
        for path in layers:
            parts = [*self.products.get(path, ())] if path in self.stacks else [""]
            names += [pattern_of(".".join(filter(None, (path, part)))) for part in parts]
        common = max(set(ranks.values()), key=[*ranks.values()].count)
        return {
            "targets": [f"^{name}$" for name in names],
            "r": common,
            "alpha": float(common),
            "overrides": {
                f"^{pattern_of(path)}$": {"r": r, "alpha": float(r)}
                for path, r in ranks.items()
                if r != common
            },
            "train": [f"^{pattern_of(path)}$" for path in tops],
            "bias": "lora_only" if self.biased else "none",
        }

    def _rank(self, path: str) -> int:
        return max((p.left.shape[2] for p in self.products.get(path, {}).values()), default=1)

    def _tensor(self, path: str, role: str, rank: int) -> torch.Tensor:
        """Return one of an adapted layer's tensors."""
        if role == OWN_BIAS:
            found = self.pair.tuned.read(f"{path}.{OWN_BIAS}")
            assert found is not None
            return found
        module = self.modules[path]
        layer: Any = type(module)  # it is patched
        parts = {}
        for part in self.products.get(path) or {"weight": None}:
            product = self.products.get(path, {}).get(part)
            parts[part] = padded(product or self._nothing(path), rank)
        shapes = layer.lora_shapes(module, LayerConfig(rank, float(rank), parts=self._parts(path)))
        if _turns(layer, module):
            parts = {n: Product(p.right.mT, p.left.mT) for n, p in parts.items()}
        assert layer.lora_layout.join is not None
        return layer.lora_layout.join(parts, shapes)[role].contiguous()

    def _parts(self, path: str) -> tuple[str, ...]:
        return tuple(self.products.get(path, ())) if path in self.stacks else ()

    def _nothing(self, path: str) -> Product:
        """Return a product of nothing, for a layer of which only the bias has changed."""
        weight = self.modules[path]._parameters["weight"]
        assert weight is not None
        height, width = weight.shape[0], weight[0].numel()
        dtype = self.dtype or torch.float32
        return Product(
            torch.zeros(1, height, 1, dtype=dtype), torch.ones(1, 1, width, dtype=dtype) / width
        )

    def _tops(self) -> list[str]:
        """Return the outermost modules that have to be kept in full.

        Raises:
            TargetError: One of them cannot be.
        """
        paths = {name.rpartition(".")[0] for name in self.full}
        tops = sorted(p for p in paths if not any(above in paths for above in parents(p)))
        problems = [
            f"{name} has changed, and is a parameter of the model itself, which no module holds"
            for name in self.full
            if "." not in name
        ]
        problems += [
            f"{path} has changed and cannot be kept in full: {fault}"
            for path in tops
            if path and (fault := train_fault(self.modules[path]))
        ]
        if problems:
            raise TargetError(listing("No adapter can say what has changed here", problems))
        return tops

    def _fill(self, tops: list[str]) -> None:
        """Give modules that are kept in full, and what PEFT takes for such, the tuned numbers."""
        names = {*shortest_names(tops, self.modules)}
        taken = {path for path in self.modules if inside(path, tops) or endings(path, names)}
        made: dict[int, nn.Parameter] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            held = [*module._parameters.items()]
            for role, parameter in held:
                name = f"{path}.{role}" if path else role
                if parameter is None or not (inside(path, taken) or id(parameter) in made):
                    continue
                if id(parameter) not in made:
                    values = self.full.get(name)
                    values = self.pair.read_tuned(name) if values is None else values
                    made[id(parameter)] = _filled(values)
        for _, module in self.model.named_modules():
            for role, parameter in [*module._parameters.items()]:
                if parameter is not None and id(parameter) in made:
                    module._parameters[role] = made[id(parameter)]

    def _stand_in(self, path: str) -> None:
        """Give a layer without data some that takes no memory: biases are not trained without."""
        module = self.modules[path]
        for role, parameter in [*module._parameters.items()]:
            if parameter is not None and parameter.is_meta:
                blank = torch.full((1,), 0.01, dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[role] = _filled(blank)

    def told(self) -> Iterable[str]:
        """Yield what is kept in full and what was not looked at."""
        for name, tensor in self.full.items():
            note = f" ({size(tensor.nbytes)})" if tensor.nbytes >= _LARGE else ""
            why = "the base does not have it" if name in self.fresh else "it has changed"
            yield f"{name} is kept in full{note}: {why}"
        if self.biased:
            yield f"biases of {len(self.biased)} layers have changed and are kept in full"
        if self.buffers:
            yield f"buffers that moved: {some_paths(sorted(self.buffers))}"
        if self.pair.only_in_base:
            yield f"the tuned model has no {some_paths(self.pair.only_in_base)}, as the base has"


def _filled(values: torch.Tensor) -> nn.Parameter:
    """Return a parameter that is no fresh one, which would be trained without being asked for."""
    parameter = nn.Parameter(values, requires_grad=False)
    mark_filled(parameter)
    return parameter


def _turns(layer: Any, module: nn.Module) -> bool:
    """Say whether a module's parameter has the side that A reads first."""
    shapes = layer.lora_shapes(module, LayerConfig(1, 1.0))
    roles = layer.lora_layout.roles
    blank = {
        role: torch.full((1,), float(2 + roles.index(role) % 2)).expand(shape)
        for role, shape in shapes.items()
    }
    product = next(iter(layer.lora_products(module, LayerConfig(1, 1.0), blank).values()))
    return bool(product.left.flatten()[0] == 2.0)
