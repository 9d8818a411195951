"""Some rows of an embedding, or of an output head, trained as they are: new tokens, for instance.

An adapter has the rows themselves, not what is added to the base's, as PEFT has them: so what
stands in the base in their place, drawn at random where tokens were added, does not matter. The
weight is neither copied nor does it get a gradient. Modules that share a weight share the rows.

Legend: N rows of an adapter, V of the weight, D width.
"""

import math
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch import nn

from hf_lora.compat.deepspeed import shape_of
from hf_lora.compat.dtensor import full_tensor
from hf_lora.functional.token_rows import NewRows, index_of, looked_up, with_columns
from hf_lora.kinds.embedding import embedding_fault
from hf_lora.layers.choice import Weights
from hf_lora.layers.fusing import multiplies
from hf_lora.layers.hosts import has_float_weight
from hf_lora.layers.instance_forward import has_foreign_forward
from hf_lora.layers.kind import Patched, parameter_of, patched_class
from hf_lora.layers.merge import not_finite, weight_fault
from hf_lora.layers.names import parameter_name
from hf_lora.layers.probe import host_class
from hf_lora.layers.replaced import Replaced, Tensors, in_place_of
from hf_lora.layers.roles import Role
from hf_lora.layers.tensor_parallel import as_distributed, split_of, to_local
from hf_lora.layers.token_rows import ROW_GROUP, ROWS, TokenRows, index_names

KEY = "token_adapter.trainable_tokens_delta"
"""What PEFT (0.21) calls the rows in a file, below the module's path."""


class TrainedRows(Patched):
    """Mixin for a module of whose weight adapters have some rows of their own."""

    lora_prefix = "Rows"
    lora_adds_up = False
    lora_token_rows: dict[str, TokenRows]
    """Adapter to its rows here."""

    weight: Any

    def lora_adapters(self) -> Collection[str]:
        """Return the adapters that have rows here."""
        return self.lora_token_rows.keys()

    def lora_rows_of(self, adapter: str) -> nn.Parameter:
        """Return an adapter's rows (N, D), also those that belong to another module."""
        return getattr(self, parameter_name(ROWS, adapter))

    def lora_roles(self, adapter: str) -> tuple[Role, ...]:
        """Return the rows, if they belong to this module."""
        rows = self.lora_token_rows[adapter]
        if rows.of is not None:
            return ()
        shape = (len(rows.ids), shape_of(self.lora_rows_of(adapter))[1])
        return (Role(ROWS, parameter_name(ROWS, adapter), shape, KEY, ROW_GROUP),)

    def lora_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return role to what this process has of the rows, if they belong to this module."""
        own = self.lora_token_rows[adapter].of is None
        return {ROWS: self.lora_rows_of(adapter)} if own else {}

    def lora_added(self) -> set[str]:
        """Return the names of the rows and of the buffers that they are found by."""
        return {
            name
            for adapter in self.lora_token_rows
            for name in (parameter_name(ROWS, adapter), *index_names(adapter))
        }

    def lora_add_rows(self, adapter: str, rows: TokenRows, dtype: torch.dtype) -> None:
        """Give an adapter rows, equal to the base's; those of another module come later."""
        weight = parameter_of(self, "weight")
        assert weight is not None
        if rows.of is None:
            ids = torch.tensor(rows.ids, device=weight.device)
            values = full_tensor(weight.detach())[ids].to(dtype, copy=True)
            self.lora_hold(parameter_name(ROWS, adapter), nn.Parameter(values))
        for name, index in zip(index_names(adapter), index_of(rows.ids), strict=True):
            self.register_buffer(name, index.to(weight.device), persistent=False)
        self.lora_token_rows = {**self.lora_token_rows, adapter: rows}
        self.lora_routing.names.add(adapter)

    def lora_share_rows(self, adapter: str, values: nn.Parameter) -> None:
        """Read the rows that an adapter has on another module, in the place of the same here."""
        self._parameters[parameter_name(ROWS, adapter)] = values

    def lora_remove(self, adapter: str) -> None:
        """Take an adapter's rows away."""
        for name in (parameter_name(ROWS, adapter), *index_names(adapter)):
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        self.lora_token_rows = {n: r for n, r in self.lora_token_rows.items() if n != adapter}

    def lora_draw(self, names: set[str]) -> None:
        """Make rows that were lost not a number, so that it is seen; they can be found again."""
        for adapter, rows in self.lora_token_rows.items():
            for name, index in zip(index_names(adapter), index_of(rows.ids), strict=True):
                if name in names:
                    self.get_buffer(name).copy_(index)
            if parameter_name(ROWS, adapter) in names:
                self.lora_rows_of(adapter).detach().fill_(math.nan)

    def lora_misfit(self) -> str | None:
        """Return whether the weight lacks some of the rows now, or None."""
        rows_here, width = shape_of(self._parameters["weight"])  # type: ignore[arg-type]
        for adapter, rows in self.lora_token_rows.items():
            there = shape_of(self.lora_rows_of(adapter))[1]
            if max(rows.ids) >= rows_here or there != width:
                return (
                    f"has {rows_here} rows of {width} now, and an adapter has the rows up to "
                    f"{max(rows.ids)}, of {there}"
                )
        return None

    def lora_is_at_start(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Say whether the rows are what the base has."""
        return all(torch.equal(rows, self.lora_old(adapter).to(rows)) for rows in tensors.values())

    def lora_old(self, adapter: str, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the base has in the place of an adapter's rows; every process takes part.

        Args:
            adapter: Its name.
            weight: The base's, where a merge has put another in its place.
        """
        weight = parameter_of(self, "weight") if weight is None else weight
        assert weight is not None
        ids = torch.tensor(self.lora_token_rows[adapter].ids, device=weight.device)
        return full_tensor(weight.detach())[ids]

    def lora_clash(self, shares: Mapping[str, float], merged: Collection[str]) -> str | None:
        """Return which rows several adapters have that are no mean of them, or None."""
        sums: dict[int, list[float]] = {}
        for adapter, factor in shares.items():
            for row in self.lora_token_rows[adapter].ids:
                sums.setdefault(row, []).append(factor)
        clashing = [
            row
            for row, factors in sums.items()
            if len(factors) > 1 and not math.isclose(sum(factors), 1.0, abs_tol=1e-6)
        ]
        return f"row {min(clashing)}, {len(clashing)} in all" if clashing else None

    def lora_split(self, adapter: str, mesh: Any) -> list[nn.Parameter]:
        """Make the rows DTensors, whole everywhere."""
        held = parameter_name(ROWS, adapter)
        if self.lora_token_rows[adapter].of is None:
            self._parameters[held] = as_distributed(self.lora_rows_of(adapter), mesh)
        return []

    def lora_merge_fault(self) -> str | None:
        """Return why rows cannot be put into the weight, or None."""
        return weight_fault(self)

    @torch.no_grad()
    def lora_merged(self, adapters: Weights, replaced: Replaced | None) -> Tensors:
        """Return the weight with the adapters' rows in the place of the base's, rounded once."""
        weight = self._parameters["weight"]
        assert weight is not None
        before = None if replaced is None else replaced.read("weight")
        old = weight if before is None else before.to(weight.device)
        here = [(name, f) for name, f in adapters if name in self.lora_token_rows]
        wide = torch.promote_types(old.dtype, torch.float32)
        rows: dict[int, torch.Tensor] = {}
        for name, factor in here:
            values = full_tensor(self.lora_rows_of(name).detach()).to(old.device, wide)
            for row, value in zip(self.lora_token_rows[name].ids, values, strict=True):
                base = old[row].to(wide)
                step = value if factor == 1.0 else base + (value - base) * factor
                rows[row] = step if row not in rows else rows[row] + (step - base)
        new = old.clone()
        ids = torch.tensor(list(rows), device=old.device)
        new[ids] = torch.stack(list(rows.values())).to(old.dtype)
        return {"weight": in_place_of(weight, new)}

    def lora_made_of(self, name: str, adapters: Weights) -> Hashable:
        """Return the weight and the rows that a merged weight is made of."""
        rows = [(id(self.lora_rows_of(n)), f) for n, f in adapters if n in self.lora_token_rows]
        return (id(parameter_of(self, name)), *rows) if rows else None

    def lora_merge_damage(self, merged: Tensors) -> str | None:
        """Return how many values are not finite that were, or None."""
        return not_finite(self, merged)

    def lora_new_rows(self) -> list[NewRows]:
        """Return the rows of the adapters that are in use here and now."""
        found = []
        for name, factor in self.lora_routing.now().live:
            if name in self.lora_token_rows:
                index = (getattr(self, held) for held in index_names(name))
                found.append(NewRows(to_local(self.lora_rows_of(name)), *index, factor=factor))
        return found

    def extra_repr(self) -> str:
        """Show the host's own line, then how many rows each adapter has."""
        shown = ", ".join(f"{name}: {len(r.ids)}" for name, r in self.lora_token_rows.items())
        return ", ".join(filter(None, (super().extra_repr(), f"rows=({shown})")))


class EmbeddingRows(TrainedRows):
    """Rows of an embedding, which scales them if it scales its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the host's rows, with those of the adapters in use among them."""
        y = super().forward(input)
        new = self.lora_new_rows()
        host: Any = self
        scale = getattr(host, "embed_scale", None)
        return looked_up(y, input, new, host.padding_idx, scale) if new else y


class LinearRows(TrainedRows):
    """Rows of a linear layer, such as an output head: each makes one of the outputs."""

    bias: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the host's output, with what the rows of the adapters in use make of it."""
        y = super().forward(input)
        new = self.lora_new_rows()
        return with_columns(y, input, self.weight, self.bias, new) if new else y


EmbeddingRows.lora_mixin = EmbeddingRows
LinearRows.lora_mixin = LinearRows


def rows_class(module: nn.Module) -> type[Patched]:
    """Return the class for a module that :func:`rows_fault` has nothing against."""
    mixin = EmbeddingRows if isinstance(module, nn.Embedding) else LinearRows
    return patched_class(mixin, type(module))


def rows_fault(module: nn.Module) -> str | None:
    """Return why rows of a module cannot be trained, or None."""
    name = host_class(module).__name__
    if isinstance(module, nn.Embedding):
        fault = embedding_fault(module, (ROWS,))
    elif not isinstance(module, nn.Linear):
        return f"{name} is neither an embedding nor a linear layer, which have a row for each token"
    elif not multiplies(host_class(module)):
        fault = f"{name} has a forward of its own, which may do more than multiply"
    elif not has_float_weight(module):
        fault = f"the weight of this {name} is not there yet, or packed or quantized"
    elif has_foreign_forward(module):
        fault = f"the forward of this {name} was replaced on the instance, which would hide them"
    else:
        fault = None
    if fault is None and split_of(module) is not None:
        fault = "tensor parallelism has split its weight, of which each process has other rows"
    return fault
