"""Everything that could be told of a model from outside, to say that nothing of it has changed."""

import dataclasses
import hashlib
from typing import Any

import torch
from torch import nn

from hf_lora.model.registry import Registry


def digest(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's type, shape and bytes."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    facts = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.blake2b(facts + raw, digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A model at one moment; two are equal if nothing but time has passed."""

    modules: list[tuple[str, int, type, bool]]
    """Path, identity, class and training flag of each module, under every name that it has."""

    parameters: list[tuple[str, int, bool, str]]
    """Name, identity, ``requires_grad`` and bytes of each Parameter."""

    buffers: list[tuple[str, str]]
    keys: list[str]
    """The state dict's."""

    attributes: dict[str, dict[str, Any]]
    """Of each module: what stands in its ``__dict__``, by identity where it is not a container."""


_CONTAINERS = set(vars(nn.Module()))


def snapshot(model: nn.Module) -> Snapshot:
    """Take everything down."""
    modules = list(model.named_modules(remove_duplicate=False))
    return Snapshot(
        modules=[(path, id(m), type(m), m.training) for path, m in modules],
        parameters=[
            (name, id(p), p.requires_grad, digest(p))
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        buffers=[(name, digest(b)) for name, b in model.named_buffers()],
        keys=list(model.state_dict()),
        attributes={
            path: {
                key: len(value) if isinstance(value, (dict, set)) else id(value)
                for key, value in vars(m).items()
                if key not in _CONTAINERS or isinstance(value, (dict, set))
            }
            for path, m in modules
        },
    )


def base_digests(model: nn.Module, added: set[str] = frozenset()) -> dict[str, str]:  # type: ignore[assignment]
    """Return the hash of each tensor of the state dict that is not in ``added``."""
    return {name: digest(t) for name, t in model.state_dict().items() if name not in added}


def low_rank(registry: Registry) -> dict[str, Any]:
    """The layers of a registry that have low-rank updates, by path."""
    return {path: m for path, m in registry.modules.items() if path not in registry.exclusive}
