"""Keeping the optimizer that a user describes to Trainer as the user described it."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def description_kept(trainer: Any) -> Iterator[None]:
    """Give a run a copy of ``optimizer_cls_and_kwargs`` to use up, and the trainer its own back.

    Trainer takes ``"params"`` out of the user's dictionary, and torch and the schedule write into
    its groups. The next Trainer that is given the dictionary, or the next run that makes a new
    optimizer, would train at the optimizer's default rate, and nothing would say so.
    """
    given = getattr(trainer, "optimizer_cls_and_kwargs", None)
    if given is None:
        yield
        return
    cls, kwargs = given
    trainer.optimizer_cls_and_kwargs = (cls, _copied(kwargs))
    try:
        yield
    finally:
        trainer.optimizer_cls_and_kwargs = given


def _copied(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Copy the dictionary and its groups; what iterates only once stays the same object."""
    params = kwargs.get("params")
    if not isinstance(params, list):
        return dict(kwargs)
    return {**kwargs, "params": [dict(g) if isinstance(g, dict) else g for g in params]}
