"""The same methods as :mod:`hf_lora.integrations.trainer.patch`, for a class of one's own."""

from collections.abc import Callable
from typing import Any

from hf_lora.integrations.trainer.patch import TRAINER


class LoRATrainerMixin:
    """What hf_lora does for Trainer, as a mixin: ``class Mine(LoRATrainerMixin, Trainer)``.

    Only for those who do not want the class Trainer to be patched, and have called
    :func:`hf_lora.integrations.trainer.patch.disable`; the plain Trainer needs nothing. Each method
    takes the arguments of Trainer's.
    """


def _before_super(name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(getattr(super(LoRATrainerMixin, self), name), self, *args, **kwargs)

    method.__name__, method.__doc__ = name, ours.__doc__
    method.__qualname__ = f"{LoRATrainerMixin.__qualname__}.{name}"
    return method


for _name, _ours in TRAINER.items():
    setattr(LoRATrainerMixin, _name, _before_super(_name, _ours))
