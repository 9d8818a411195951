"""LoRA on experts that are stacked in one parameter: low-rank products on the routed tokens only.

Each expert has factors of its own. They are kept as PEFT keeps them, in one A and one B for each
parameter. Never is there an update of the size of the stack, except in a merge.
Legend: E experts, I input and O output features, R rank.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_lora.compat.dtensor import is_distributed
from hf_lora.compat.experts import declared, forward_below, is_expert_parallel
from hf_lora.errors import StateError
from hf_lora.functional.grouped import (
    Factors,
    stack_a,
    stack_b,
    stack_norm,
    stack_product,
)
from hf_lora.functional.init import init_low_rank
from hf_lora.functional.low_rank import Product
from hf_lora.functional.packed import PackedStack
from hf_lora.kinds.packed_experts import is_packed
from hf_lora.kinds.stacked import (
    activation_fault,
    is_stack,
    is_turned,
    run,
    sizes,
    trial_rows,
)
from hf_lora.layers.factors import Factored
from hf_lora.layers.instance_forward import has_foreign_forward
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import parameter_name
from hf_lora.layers.probe import host_class
from hf_lora.layers.roles import FACTOR_A, FACTOR_B, Layout, Role, Shapes
from hf_lora.layers.tensor_parallel import to_local

PARTS = ("gate_up_proj", "up_proj", "down_proj")
"""The parameters that can be adapted, in the order in which experts have them."""


def part_roles(part: str) -> tuple[str, str]:
    """Return what A and B of a parameter are called."""
    return f"lora_{part}_A", f"lora_{part}_B"


def peft_key(parts: Sequence[str], part: str, factor: str) -> str:
    """Return PEFT's name of a factor below the path of its module.

    PEFT puts a wrapper for each parameter around the module, that of the first innermost, and the
    parameters' names are not in the file.
    """
    return "base_layer." * (len(parts) - 1 - parts.index(part)) + f"{factor}.weight"


def _pairs(shapes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what there is of each part's A and B."""
    named = {part: part_roles(part) for part in PARTS}
    return {part: (shapes[a], shapes[b]) for part, (a, b) in named.items() if a in shapes}


def _fault(shapes: Shapes) -> str | None:
    for part, (a, b) in _pairs(shapes).items():
        if not len(a) == len(b) == 2 or a[0] != b[1] or 0 in (*a, *b):
            return f"has lora_A {a} and lora_B {b} for {part}, which do not fit together"
    return None


def _norm(tensors: Mapping[str, torch.Tensor], config: LayerConfig) -> float:
    each = [Factors(a, b, config.r, config.scaling) for a, b in _pairs(tensors).values()]
    return float(sum(stack_norm(factors) ** 2 for factors in each) ** 0.5)


def _split(tensors: Mapping[str, torch.Tensor], config: LayerConfig) -> dict[str, Product]:
    """Return B (E, O, R) and A (E, R, I) of each parameter."""
    return {
        part: Product(stack_b(b, config.r).transpose(1, 2), stack_a(a, config.r))
        for part, (a, b) in _pairs(tensors).items()
    }


def _join(products: Mapping[str, Product], shapes: Shapes) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for part, (left, right) in products.items():
        a, b = part_roles(part)
        found |= {a: right.flatten(0, 1), b: left.permute(1, 2, 0).flatten(1)}
    return found


EXPERTS = Layout(
    roles=tuple(role for part in PARTS for role in part_roles(part)),
    fault=_fault,
    rank=lambda shapes: None,  # how many experts there are is not in the file
    norm=_norm,
    split=_split,
    join=_join,
)
"""A (E·R, I) and B (O, R·E) of each parameter, as PEFT has them."""


class LoRAExperts(Factored):
    """Mixin that adds low-rank updates to the stacked matrices of a layer of experts.

    With adapters in use it computes as transformers' ``grouped_mm`` does, whichever way is chosen
    for the frozen experts; these give the same, but for rounding.
    """

    lora_layout = EXPERTS

    @classmethod
    def lora_takes(cls, host: nn.Module) -> bool:
        """Say whether a module declares to transformers how its experts are stacked."""
        return declared(host) is not None

    @classmethod
    def lora_parts(cls, host: nn.Module) -> tuple[str, ...]:
        """Return the names of the two stacked parameters."""
        said = declared(host)
        return () if said is None else (said.up, said.down)

    @classmethod
    def lora_fault(cls, host: nn.Module) -> str | None:
        """Return why experts cannot be adapted, or None."""
        said = declared(host)
        kind = host_class(host)
        name = kind.__name__
        assert said is not None
        if is_expert_parallel(host):
            return f"the experts of this {name} are spread over several processes"
        if not is_packed(host) and forward_below(kind, said) is None:
            return f"the forward of {name} has other arguments than those of stacked experts"
        for part in (said.up, said.down):
            stack = parameter_of(host, part)
            if stack is None or not (is_stack(stack) or isinstance(stack, PackedStack)):
                return f"the {part} of this {name} is not there, or packed, quantized or spread"
        if has_foreign_forward(host):
            return f"the forward of this {name} was replaced on the instance, which would hide LoRA"
        return None

    @classmethod
    def lora_rank_fault(cls, host: nn.Module, r: int) -> str | None:
        """Return what is wrong with a rank: it is at most the smaller side of an expert."""
        most = min(min(sizes(host, part)[1:]) for part in cls.lora_parts(host))
        return f"r={r} is larger than an expert's smaller side, {most}" if r > most else None

    @classmethod
    def lora_probe_key(cls, host: nn.Module) -> tuple:
        """Return what is common to layers of experts of which one is tried."""
        kind = host_class(host)
        each = [sizes(host, part) for part in cls.lora_parts(host)]
        return kind, declared(host), *each

    @classmethod
    @torch.no_grad()
    def lora_gradient_fault(cls, host: nn.Module, *, certain: bool = False) -> str | None:
        """Compare a class's own forward with what it declares, on a few rows; or None."""
        kind = host_class(host)
        said = declared(host)
        assert said is not None
        own = forward_below(kind, said)
        stack = parameter_of(host, said.up)
        # what is packed was tried before
        if certain or own is None or stack is None or stack.is_meta or is_packed(host):
            return None
        rows = trial_rows(host, stack, said)
        try:
            wanted, given = own(host, *rows), run(host, said, rows, {})
        except Exception as error:
            return f"it cannot be computed with as it declares itself ({error})"
        # some compute in float32 whatever they are given
        unit = max(torch.finfo(dtype).eps for dtype in (stack.dtype, torch.float32))
        wide = unit**0.5 * wanted.abs().max()
        if not bool(((wanted - given).abs() <= wide).all()):
            return "its own forward gives something else than the layout that it declares"
        return activation_fault(host, said, stack)

    @classmethod
    def lora_shapes(cls, host: nn.Module, config: LayerConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B of each part."""
        found: dict[str, tuple[int, ...]] = {}
        for part in config.parts or cls.lora_parts(host):
            number, wide_in, wide_out = sizes(host, part)
            a, b = part_roles(part)
            found |= {a: (number * config.r, wide_in), b: (wide_out, config.r * number)}
        return found

    @classmethod
    def lora_fit_fault(cls, host: nn.Module, shapes: Shapes) -> str | None:
        """Return how the sizes differ, or None."""
        for part, (a, b) in _pairs(shapes).items():
            if part not in cls.lora_parts(host):
                return f"the adapter is for a {part}, and {type(host).__name__} has none"
            number, *widths = sizes(host, part)
            if [a[1], b[0]] != widths or a[0] % number:
                return (
                    f"the adapter has lora_A {a} and lora_B {b} for {part}, which is {number} "
                    f"experts of in, out = {tuple(widths)}"
                )
        return None

    @classmethod
    def lora_products(
        cls, host: nn.Module, config: LayerConfig, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Product]:
        """Return the update of each stack."""
        return {
            part: stack_product(Factors(a, b, config.r, config.scaling), turned=is_turned(host))
            for part, (a, b) in _pairs(tensors).items()
        }

    def lora_held(self, adapter: str) -> tuple[str, ...]:
        """Return the names of all factors of an adapter."""
        return self.lora_names_of(adapter, self.lora_slots[adapter])

    def lora_names_of(self, adapter: str, config: LayerConfig) -> tuple[str, ...]:
        """Return the names that an adapter of these numbers has its factors under."""
        parts = config.parts or self.lora_parts(self)
        return tuple(parameter_name(role, adapter) for part in parts for role in part_roles(part))

    def lora_factors(self, adapter: str) -> tuple[nn.Parameter, ...]:
        """Return all factors of an adapter."""
        return tuple(getattr(self, held) for held in self.lora_held(adapter))

    def lora_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return role to what this process has of each factor."""
        roles = self.lora_shapes(self, self.lora_slots[adapter])
        return dict(zip(roles, self.lora_factors(adapter), strict=True))

    @torch.no_grad()
    def lora_start(self, factors: Sequence[torch.Tensor], config: LayerConfig, method: str) -> None:
        """Fill the factors of each expert as those of a layer of its own."""
        for a, b in zip(factors[::2], factors[1::2], strict=True):
            a_ERI, b_ERO = stack_a(a.detach(), config.r), stack_b(b.detach(), config.r)
            for e in range(len(a_ERI)):
                init_low_rank(a_ERI[e], b_ERO[e].t(), method)

    def lora_roles(self, adapter: str) -> tuple[Role, ...]:
        """Return A and B of each part, under PEFT's keys."""
        config = self.lora_slots[adapter]
        shapes, parts = self.lora_shapes(self, config), config.parts or self.lora_parts(self)
        found = []
        for part in parts:
            a, b = part_roles(part)
            for role, name, group in ((a, "lora_A", FACTOR_A), (b, "lora_B", FACTOR_B)):
                held, key = parameter_name(role, adapter), peft_key(parts, part, name)
                found.append(Role(role, held, shapes[role], key, group))
        return tuple(found)

    def lora_is_at_start(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Say whether every B is zero."""
        return not any(b.any() for _, b in _pairs(tensors).values())

    def lora_merge_fault(self) -> str | None:
        """Return why updates cannot be put into the stacks, or None."""
        stacks = [self._parameters[part] for part in self.lora_parts(self)]
        if any(stack is None or stack.is_meta or is_distributed(stack) for stack in stacks):
            return "its stacks are not in memory, or spread over several processes"
        if is_packed(self):
            return (
                "its stacks are packed in 4 bits (hf_lora.unwrap, hf_lora.dequantize_experts and "
                "hf_lora.load make plain ones of them; hf_lora.merge_checkpoint merges files)"
            )
        return None

    def lora_changes(self, adapter: str, weight: str) -> bool:
        """Say whether an adapter has an update of one of the stacks."""
        config = self.lora_slots.get(adapter)
        return config is not None and weight in (config.parts or self.lora_parts(self))

    def _factors(self, name: str, factor: float) -> dict[str, Factors]:
        config = self.lora_slots.get(name)
        if config is None:
            return {}
        s = config.scaling * factor
        said, pairs = declared(self), _pairs(self.lora_tensors(name))
        swapped = said is not None and said.peft_swaps
        return {
            part: Factors(to_local(a), to_local(b), config.r, s, swapped)
            for part, (a, b) in pairs.items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the host's output, with every active adapter's update of its matrices."""
        live = [pair for pair in self.lora_routing.now().live if pair[0] in self.lora_slots]
        if not live:
            return super().forward(*args, **kwargs)
        said = declared(self)
        if said is None or is_expert_parallel(self):
            raise StateError(
                f"The experts of this {self.lora_host.__name__} were spread over several processes "
                "after they were adapted, where a process would need a part of the factors only. "
                "Turn expert parallelism off, or take the adapters off."
            )
        found: dict[str, list[tuple[Factors, float]]] = {}
        for name, factor in live:
            dropout = self.lora_slots[name].dropout if self.training else 0.0
            for part, factors in self._factors(name, factor).items():
                found.setdefault(part, []).append((factors, dropout))
        if kwargs:  # in whatever order they were named
            args = tuple(
                inspect.signature(super().forward).bind(*args, **kwargs).arguments.values()
            )
        return run(self, said, args, found, self.lora_routing.plain)


LoRAExperts.lora_mixin = LoRAExperts
