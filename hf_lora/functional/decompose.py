"""Sums of low-rank products, decomposed in their factors: nothing has the size of the dense sum.

The factors of all terms span one space of outputs and one of inputs. In bases of these each term is
a small matrix, its core, without loss; so the sum's singular values, the best product of a lower
rank and its error are those of a small matrix. (QR of the stacked factors, then an SVD; in float64.
Core spaces: arXiv 2509.17786; aligned bases: KnOTS, arXiv 2410.19735.)

Legend: E matrices of a stack, O output and I input features, R rank of all terms together, Q and P
sizes of the two spaces.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_lora.functional.low_rank import Product

_NOTHING = 1e-12
"""Singular values below this share of the largest are rounding errors of float64."""


class Spaces(NamedTuple):
    """Bases that the factors of several products have in common, and the products in them."""

    left: torch.Tensor
    """(E, O, Q), orthonormal columns."""

    right: torch.Tensor
    """(E, P, I), orthonormal rows."""

    cores: tuple[torch.Tensor, ...]
    """(E, Q, P) of each product, which is ``left core right``."""


class Spectrum(NamedTuple):
    """A matrix in two bases by its singular vectors, the largest singular value first."""

    spaces: Spaces
    u: torch.Tensor
    """(E, Q, S)."""

    values: torch.Tensor
    """(E, S), never negative."""

    vh: torch.Tensor
    """(E, S, P)."""

    @property
    def squares(self) -> torch.Tensor:
        """The squares of each rank's singular values, of all matrices together, (S,)."""
        return self.values.square().sum(0)

    def rank(self) -> int:
        """Return the smallest rank that loses nothing, at least 1."""
        least = _NOTHING * float(self.values.max())
        return max(1, int((self.values > least).any(0).sum()))

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that keeps a share of the squared norm, at least 1."""
        kept = self.squares.cumsum(0)
        enough = kept >= energy * kept[-1] * (1 - _NOTHING)
        return min(int((~enough).sum()) + 1, self.rank())

    def product(self, rank: int) -> Product:
        """Return the nearest product of a rank in the Frobenius norm, both factors equally large.

        It has zeros where the rank is more than there are singular values.
        """
        roots = self.values[:, :rank].sqrt()
        # contiguous: it takes five times as long otherwise
        left = self.spaces.left @ (self.u[:, :, :rank] * roots[:, None]).contiguous()
        right = (roots[:, :, None] * self.vh[:, :rank]) @ self.spaces.right
        return padded(Product(left, right), rank)

    def lost(self, rank: int) -> float:
        """Return the norm of what that leaves out."""
        return math.sqrt(float(self.squares[rank:].sum()))


def spaces(products: Sequence[Product]) -> Spaces:
    """Return common bases of products, in float64, and each product in them."""
    left, r_left = torch.linalg.qr(torch.cat([p.left.double() for p in products], 2))
    stacked = torch.cat([p.right.double() for p in products], 1)
    right, r_right = torch.linalg.qr(stacked.mT)
    cores, at = [], 0
    for product in products:
        end = at + product.left.shape[2]
        cores.append(r_left[:, :, at:end] @ r_right[:, :, at:end].mT)
        at = end
    return Spaces(left, right.mT, tuple(cores))


def aligned(found: Spaces) -> Spaces:
    """Return the same in the bases that the products themselves decide, but for signs.

    They are the left singular vectors of the products side by side and the right ones of the
    products on top of each other: whatever the order of the products, and whatever factors each was
    given in, they are the same.
    """
    u, _, _ = torch.linalg.svd(torch.cat(found.cores, 2), full_matrices=False)
    _, _, vh = torch.linalg.svd(torch.cat(found.cores, 1), full_matrices=False)
    cores = tuple(u.mT @ core @ vh.mT for core in found.cores)
    return Spaces(found.left @ u, vh @ found.right, cores)


def spectrum(found: Spaces, core: torch.Tensor) -> Spectrum:
    """Return the singular values and vectors of a core, (E, Q, P)."""
    return Spectrum(found, *torch.linalg.svd(core, full_matrices=False))


def ties(cores: Sequence[torch.Tensor], density: float) -> torch.Tensor:
    """Return the TIES merge of matrices (arXiv 2306.01708), (E, Q, P).

    Of each the largest entries are kept, for each entry the sign is elected that has more on its
    side in sum, and those that have it are averaged.

    Args:
        cores: (E, Q, P) each, with their weights in them.
        density: Share of the entries that is kept.
    """
    stacked = torch.stack([_largest(core, density) for core in cores])
    signs = stacked.sum(0).sign()
    agree = (stacked.sign() == signs) & (signs != 0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)


def dare(core: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Return a matrix of which entries are dropped at random and the rest is scaled up (DARE).

    In expectation it is the matrix (arXiv 2311.03099).
    """
    drawn = torch.rand(core.shape, generator=generator, dtype=core.dtype)
    return torch.where(drawn < density, core / density, torch.zeros_like(core))


def padded(product: Product, rank: int) -> Product:
    """Return the same product with a rank that is at least its own: the rest is zeros."""
    more = rank - product.left.shape[2]
    if more <= 0:
        return product
    left, right = product
    return Product(
        torch.cat([left, left.new_zeros(*left.shape[:2], more)], 2),
        torch.cat([right, right.new_zeros(len(right), more, right.shape[2])], 1),
    )


def inner(one: Product, other: Product) -> float:
    """Return the Frobenius inner product, in float64: ``tr((LᵀL')(R'Rᵀ))``."""
    left = one.left.double().mT @ other.left.double()
    right = one.right.double() @ other.right.double().mT
    return float((left * right).sum())


def rounding(exact: Product, rounded: Product) -> float:
    """Return the norm of the difference of two products with nearly the same factors.

    It is made of the factors' differences, so that no digits cancel.
    """
    left, right = exact.left.double(), exact.right.double()
    other = rounded.right.double()
    by = Product(
        torch.cat([rounded.left.double() - left, left], 2), torch.cat([other, other - right], 1)
    )
    return math.sqrt(max(inner(by, by), 0.0))


def effective_rank(values: torch.Tensor) -> float:
    """Return the exponential of the entropy of singular values (Roy and Vetterli, 2007).

    Between 1, where one counts, and their number, where all are equal; 0 where all are zero.
    """
    total = values.sum()
    if not float(total):
        return 0.0
    shares = values / total
    return math.exp(-float(torch.xlogy(shares, shares).sum()))


def _largest(core: torch.Tensor, density: float) -> torch.Tensor:
    """Return each matrix with its largest entries alone, at least one."""
    flat = core.flatten(1)
    count = max(1, int(density * flat.shape[1]))
    at = flat.abs().topk(count, dim=1).indices
    return torch.zeros_like(flat).scatter(1, at, flat.gather(1, at)).view_as(core)
