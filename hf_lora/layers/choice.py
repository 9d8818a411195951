"""Which adapters are used, and how strongly: an immutable record that a layer asks for once a call.

A model has a standing choice, which every thread sees. A thread or an asyncio task can have choices
of its own on top of it: a stack in a context variable, of ``use_adapter`` blocks that are open, and
of functions that autograd runs a second time and that shall do what they did the first time.
"""

from contextvars import ContextVar, Token
from typing import NamedTuple

Weights = tuple[tuple[str, float], ...]
"""Adapter and the factor of its update, in order; no factor is zero."""


class Choice(NamedTuple):
    """What the layers of one model do."""

    chosen: Weights = ()
    """The adapters in use."""

    merged: Weights = ()
    """The adapters that are inside the weights."""

    live: Weights = ()
    """Those in use that are not inside the weights: what layers add."""

    @classmethod
    def of(cls, chosen: Weights, merged: Weights = ()) -> "Choice":
        """Return the choice of these adapters while those are inside the weights."""
        inside = dict(merged)
        return cls(chosen, merged, tuple(pair for pair in chosen if pair[0] not in inside))

    def without(self, name: str) -> "Choice":
        """Return the same without one adapter."""
        return Choice.of(tuple(pair for pair in self.chosen if pair[0] != name), self.merged)


class Block:
    """A stretch of execution with choices of its own."""

    __slots__ = ("__weakref__", "again", "names", "open", "token")

    def __init__(self, *, again: bool = False) -> None:
        self.open = True
        """False once it was left, perhaps by a context that does not have it on its stack."""

        self.again = again
        """Whether this is a function's second run, bound to the adapters of its first."""

        self.names: set[str] = set()
        """Every adapter that was chosen in it."""

        self.token: Token[tuple[Frame, ...]] | None = None


class Frame(NamedTuple):
    """What a block says of one model."""

    block: Block
    model: int
    """The number of the model's routing."""

    choice: Choice


STACK: ContextVar[tuple[Frame, ...]] = ContextVar("hf_lora.choices")


def enter(block: Block, *frames: Frame) -> None:
    """Put a block on this context's stack."""
    for frame in frames:
        block.names.update(name for name, _ in frame.choice.chosen)
    stack = STACK.get(())
    if not all(frame.block.open for frame in stack):  # closed by another context
        stack = tuple(frame for frame in stack if frame.block.open)
    block.token = STACK.set((*stack, *frames))


def leave(block: Block) -> None:
    """Take a block off, wherever on this context's stack it is."""
    block.open = False
    stack = STACK.get(())
    rest = tuple(frame for frame in stack if frame.block is not block)
    assert block.token is not None
    if len(rest) == len(stack):  # entered in another context, which sees that it is closed
        return
    before = block.token.old_value
    try:
        # where nothing was, nothing shall be, instead of an empty stack: that is the fast path
        if rest == (() if before is Token.MISSING else before):
            STACK.reset(block.token)
            return
    except ValueError:  # entered in another context, of which this one is a copy
        pass
    STACK.set(rest)


def change(block: Block, model: int, choice: Choice) -> None:
    """Have a block of this context say something else of a model."""
    block.names.update(name for name, _ in choice.chosen)
    STACK.set(
        tuple(
            Frame(block, model, choice) if frame.block is block and frame.model == model else frame
            for frame in STACK.get(())
        )
    )
