"""How adapters are put together: which method, of which rank, and what of that makes no sense."""

import dataclasses
import hashlib

import torch

from hf_lora.errors import ConfigError, listing
from hf_lora.functional.decompose import Spaces, Spectrum, aligned, dare, spectrum, ties
from hf_lora.peft_names import METHODS
from hf_lora.text import show

CAT, SVD, TIES, DARE = KNOWN = ("cat", "svd", "ties", "dare")
_NAMES = ", ".join(KNOWN)
_SPARSE = (TIES, DARE)


@dataclasses.dataclass(frozen=True)
class Method:
    """A checked way to put adapters together."""

    name: str
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    seed: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether the result is the weighted sum, but for what a lower rank loses."""
        return self.name not in _SPARSE

    def rank_of(self, found: Spectrum) -> int:
        """Return the rank that a matrix of these singular values is given."""
        rank = found.rank() if self.energy is None else found.rank_for(self.energy)
        return rank if self.rank is None else min(rank, self.rank)

    def decomposed(self, found: Spaces, name: str) -> Spectrum:
        """Return what the method makes of the terms, by its singular values.

        Args:
            found: The terms, with their weights in them.
            name: Of the tensor: entries are dropped as name and seed say, in whatever order.
        """
        if self.is_linear:
            return spectrum(found, sum(found.cores))  # type: ignore[arg-type]
        assert self.density is not None
        found = aligned(found)
        if self.name == TIES:
            return spectrum(found, ties(found.cores, self.density))
        dropped = [
            dare(core, self.density, _generator(f"{self.seed}:{number}:{name}"))
            for number, core in enumerate(found.cores)
        ]
        return spectrum(found, sum(dropped))  # type: ignore[arg-type]


def checked(
    name: str | None,
    *,
    rank: int | None,
    energy: float | None,
    density: float | None = None,
    seed: int = 0,
) -> Method:
    """Return a method, or say all that is wrong with what was asked for.

    Raises:
        ConfigError: It is unknown or meaningless, a number is out of range, or two contradict.
    """
    reduces = rank is not None or energy is not None
    name = (SVD if reduces else CAT) if name is None else name
    problems: list[str] = []
    if name not in KNOWN:
        known = METHODS.get(name) if isinstance(name, str) else None
        problems.append(f"method: {known or f'{show(name)} is not one of {_NAMES}'}")
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if rank is not None and (not whole or rank < 1):
        problems.append(f"rank: {show(rank)} is not a whole number of at least 1")
    if energy is not None and not _is_share(energy):
        problems.append(f"energy: {show(energy)} is not a share above 0 and at most 1")
    if name == CAT and reduces:
        problems.append("method: 'cat' keeps every rank; 'svd' gives the nearest of a lower one")
    if name in _SPARSE and density is None:
        problems.append(f"density: say which share of the entries {name} keeps, such as 0.5")
    if density is not None and not _is_share(density):
        problems.append(f"density: {show(density)} is not a share above 0 and at most 1")
    if density is not None and name in (CAT, SVD):
        problems.append(f"density: {name} drops nothing; it is for ties and dare")
    if not isinstance(seed, int) or isinstance(seed, bool):
        problems.append(f"seed: {show(seed)} is not a whole number")
    if problems:
        raise ConfigError(listing("Adapters cannot be combined so", problems))
    return Method(name, rank, energy, density, seed)


def _is_share(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= 1  # type: ignore[operator]


def _generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
