"""What all layers of one model share: which adapters are used, so that a switch is O(1)."""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hf_lora.compat.torch_checkpoint import keep_functions
from hf_lora.errors import StateError
from hf_lora.layers.choice import STACK, Block, Choice, Frame, Weights, change, enter, leave
from hf_lora.layers.input_groups import Sharing

_NUMBERS = itertools.count(1)
_LISTED: "weakref.WeakValueDictionary[int, Routing]" = weakref.WeakValueDictionary()
"""Number to routing, for those who have no module at hand: compiled code and checkpointing."""


class Routing:
    """The state that all layers of one model share.

    The standing choice is one for all threads; :meth:`block` gives a thread or task its own.
    """

    stack = property(STACK.get)
    """This context's stack, or, where nothing was put on it, the routing itself.

    A getter in C, which ``torch.compile`` reads as an attribute and checks before each call of
    compiled code; in Python it would not take a context variable.
    """

    def __init__(self, chosen: Weights = ()):
        self.standing = Choice.of(chosen)
        self.number = 0
        self.blocks: weakref.WeakSet[Block] = weakref.WeakSet()
        """The ``use_adapter`` blocks on this model, of all contexts."""

        self.names: set[str] = set()
        """The adapters that the model has."""

        self.factors: dict[str, tuple[str, str]] = {}
        """What each adapter's A and B are called on a layer."""

        self.biased: dict[str, set[str]] = {}
        """The adapters that have biases on low-rank layers, and the roles of these."""

        self.starts: dict[str, str] = {}
        """How each adapter's factors are drawn, should they have to be drawn anew."""

        self.frozen: set[str] = set()
        """Those whose tensors do not train."""

        self.disabled: Weights = ()
        """What was in use before transformers' ``disable_adapters``."""

        self.plain = False
        """Whether every layer takes the plain path: the oracle of the fused one."""

        self.owned = False
        """Whether it is a wrapped model's, and not that of a layer which was built by itself."""

        self.sharing = Sharing()
        """Which layers read the same tensor and are computed together."""

    def enlist(self) -> None:
        """Let this routing be found by its number; before that nothing can switch it."""
        keep_functions(as_at_first)
        self.number = next(_NUMBERS)
        _LISTED[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the standing choice; blocks are about this very model."""
        return vars(self) | {"blocks": (), "number": min(self.number, 1)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.blocks = weakref.WeakSet()
        if self.number:
            self.enlist()

    def now(self) -> Choice:
        """Return what layers have to do, in this thread or task."""
        stack = self.stack
        return self.standing if stack is self else self._within(stack)  # type: ignore[arg-type]

    def _within(self, stack: tuple[Frame, ...]) -> Choice:
        for block, model, choice in reversed(stack):
            if model != self.number or not block.open:
                continue
            if block.again:
                self._check_unchanged(choice)
            if choice.merged == self.standing.merged:
                return choice
            return Choice.of(choice.chosen, self.standing.merged)
        return self.standing

    def _check_unchanged(self, choice: Choice) -> None:
        gone = [name for name, _ in choice.live if name not in self.names]
        if gone or choice.merged != self.standing.merged:
            what = f"{', '.join(gone)} deleted" if gone else "adapters merged or unmerged"
            raise StateError(
                f"Layers under activation checkpointing run again in the backward pass, but {what} "
                "since their forward, so they cannot do the same again. Call backward() first."
            )

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters in use here, in order."""
        return tuple(name for name, _ in self.now().chosen)

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that are inside the weights; their updates are not added a second time."""
        return tuple(name for name, _ in self.standing.merged)

    def choose(self, chosen: Weights) -> None:
        """Use these adapters: in the innermost block that is open here, else in all threads."""
        choice = Choice.of(chosen, self.standing.merged)
        for frame in reversed(STACK.get(())):
            if frame.model == self.number and frame.block.open and not frame.block.again:
                change(frame.block, self.number, choice)
                return
        self.standing = choice

    def merge(self, merged: Weights) -> None:
        """Note which adapters are inside the weights now."""
        self.standing = Choice.of(self.standing.chosen, merged)

    def block(self, chosen: Weights) -> Block:
        """Open a block in which these adapters are used; :func:`choice.leave` closes it."""
        block = Block()
        self.blocks.add(block)
        enter(block, Frame(block, self.number, Choice.of(chosen)))
        return block

    @contextlib.contextmanager
    def base_read(self) -> Iterator[None]:
        """Have modules that are trained in full read as they stand in the base, merged or not."""
        block = self.block(self.standing.merged)
        try:
            yield
        finally:
            leave(block)

    def used_elsewhere(self, names: tuple[str, ...] | None = None) -> bool:
        """Say whether a block of another thread or task is open (on one of these adapters)."""
        own = {frame.block for frame in STACK.get(())}
        return any(
            block.open and block not in own and (names is None or block.names & set(names))
            for block in list(self.blocks)
        )

    def forget(self, name: str) -> None:
        """Drop whatever is kept under the name of an adapter that is taken off."""
        self.starts.pop(name, None)
        self.biased.pop(name, None)
        self.factors.pop(name, None)
        self.names.discard(name)
        self.frozen.discard(name)
        self.disabled = Choice.of(self.disabled).without(name).chosen
        self.standing = self.standing.without(name)
        for frame in STACK.get(()):
            if frame.model == self.number and not frame.block.again:
                change(frame.block, self.number, frame.choice.without(name))

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Have the choices at the end that there are now, also of adapters gone in between."""
        standing, stack = self.standing, STACK.get(None)
        try:
            yield
        finally:
            self.standing = standing
            if stack is not None:
                STACK.set(stack)

    def seen_here(self) -> "Routing":
        """Return a routing on which this context's choice stands, for threads that run a copy."""
        choice = self.now()
        if choice is self.standing:
            return self
        seen = Routing()
        vars(seen).update(vars(self) | {"number": 0, "standing": choice})
        return seen


def as_at_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that, whenever it runs, uses the adapters that are in use now."""
    choices = [(number, routing.now()) for number, routing in list(_LISTED.items())]
    if not choices:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        block = Block(again=True)
        enter(block, *(Frame(block, number, choice) for number, choice in choices))
        try:
            return function(*args, **kwargs)
        finally:
            leave(block)

    return run


_LIBRARY = torch.library.Library("hf_lora", "FRAGMENT")
_LIBRARY.define(
    "strengths(int model, str[] adapters, Device device) -> Tensor",
    # a recorded CUDA graph would keep the choice of the moment
    tags=(torch.Tag.cudagraph_unsafe,),
)


def _strengths(model: int, adapters: list[str], device: torch.device) -> torch.Tensor:
    live = dict(_LISTED[model].now().live)
    return torch.tensor([live.get(name, 0.0) for name in adapters], device=device)


def _empty(model: int, adapters: list[str], device: torch.device) -> torch.Tensor:
    return torch.empty(len(adapters), device=device)


_LIBRARY.impl("strengths", _strengths, "CompositeExplicitAutograd")
torch.library.register_fake("hf_lora::strengths", _empty, lib=_LIBRARY)


def scales(routing: Routing, names: list[str], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield the factor of each adapter's update here and now, zero for those not in use.

    An operator of its own: compiled code reads the choice by it each time, so that a graph serves
    all choices, threads and tasks.
    """
    yield from torch.ops.hf_lora.strengths(routing.number, names, device).unbind()
