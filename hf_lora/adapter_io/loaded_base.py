"""What an adapter's files are compared with in a base: here, a model that is in memory."""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.base_check import NO_ROWS, Rows, base_differences
from hf_lora.adapter_io.base_weights import BaseTensors
from hf_lora.adapter_io.rename import Renaming
from hf_lora.compat.accelerate import present
from hf_lora.compat.dtensor import full_tensor
from hf_lora.layers.roles import Place
from hf_lora.layers.trained import own_tensors
from hf_lora.model.checks import check_present
from hf_lora.planning.heads import output_head
from hf_lora.planning.unfilled import Unfilled, find_unfilled


class LoadedBase:
    """A model's own tensors, wherever they are kept."""

    def __init__(self, model: nn.Module):
        self.model = model

    def check_present(self, adapted: list[str], repeated: list[str]) -> None:
        """Raise StateError if modules have no data that is needed.

        Args:
            adapted: Paths of the layers that get factors.
            repeated: Paths of the modules of which the file has tensors of their own.
        """
        check_present(self.model, adapted, repeated)

    def equals(self, place: Place, tensor: torch.Tensor) -> bool:
        """Say whether a tensor is what the base has at a place, as far as their types tell."""
        path, role = place
        module = self.model.get_submodule(path)
        with present(module):
            return same_values(tensor, dict(own_tensors(module, (role,)))[role])

    def unfilled(self) -> Unfilled:
        """Return which parts the base's checkpoint has left random."""
        return find_unfilled(self.model, output_head(self.model))

    def differences(
        self,
        fingerprint: dict[str, Any],
        names: Renaming,
        others: Collection[str],
        rows: Rows = NO_ROWS,
    ) -> list[str]:
        """Return a line for each thing in which it is not the base of a fingerprint.

        Args:
            fingerprint: As the header holds it.
            names: How the file's names become the model's.
            others: Paths of modules, and names of tensors, that are no part of the base.
            rows: Names of tensors to those of their rows that are no part of it either.
        """
        base = BaseTensors(self.model, together=True)
        return base_differences(fingerprint, base, names, others, rows)


def same_values(tensor: torch.Tensor, base: torch.Tensor) -> bool:
    """Say whether two tensors are the same, to the precision of the coarser of their types."""
    base = full_tensor(base)
    if tensor.dtype == base.dtype or not base.is_floating_point():
        return torch.equal(tensor, base.cpu())
    coarse = min(tensor.dtype, base.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(tensor.to(coarse), base.detach().cpu().to(coarse))
