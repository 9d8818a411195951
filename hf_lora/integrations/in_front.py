"""Putting a function of ours in front of one of another library, once, and taking it off again."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from hf_lora.errors import HfLoRAWarning

Original = Callable[..., Any]
"""What stood there; of a method, bound to its object."""

_MARK = "_hf_lora_patch"


def put_in_front(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Have ``ours(original, *args)`` called instead of ``owner.name(*args)``.

    Args:
        owner: A module, or the class that has the method itself (not only inherits it).
        name: The function or method; a class method stays one.
        ours: Gets the original first, and of a method then the object or the class.
    """
    original = vars(owner)[name]
    if is_in_front(original):
        return
    if not inspect.isclass(owner):
        setattr(owner, name, _marked(original, functools.partial(ours, original)))
    elif isinstance(original, classmethod):
        method = _in_front_of_method(original.__func__, ours)
        setattr(owner, name, classmethod(method))
    else:
        setattr(owner, name, _in_front_of_method(original, ours))


def patch_class(
    module: Any, class_name: str, methods: Mapping[str, Callable[..., Any]], consequence: str | None
) -> None:
    """Put functions in front of a class's methods; what this version does not have is left out.

    Args:
        module: Where the class is.
        class_name: Its name.
        methods: Name of each method to what comes in front of it: see :func:`put_in_front`.
        consequence: What to warn of where one is missing; None not to.
    """
    owner = getattr(module, class_name, None)
    missing = missing_parts(owner, tuple(methods))
    if missing and consequence is not None:
        warn_of_missing(f"{module.__name__}.{class_name}", missing, consequence)
    for name, ours in methods.items():
        if name not in missing:
            put_in_front(owner, name, ours)


def take_off(owner: Any, name: str) -> None:
    """Undo :func:`put_in_front`."""
    found = vars(owner).get(name)
    if is_in_front(found):
        assert not isinstance(found, classmethod)
        setattr(owner, name, found.__wrapped__)


def is_in_front(found: Any) -> bool:
    """Say whether what stands there is ours."""
    return hasattr(getattr(found, "__func__", found), _MARK)


def missing_parts(owner: Any, names: list[str] | tuple[str, ...]) -> list[str]:
    """Return which of these a version of another library does not have."""
    return [name for name in names if name not in (vars(owner) if owner is not None else ())]


def warn_of_missing(where: str, parts: list[str], consequence: str) -> None:
    """Warn that a version of another library lacks what hf_lora hooks into."""
    warnings.warn(
        f"{where} of this version has no {', '.join(parts)}: hf_lora cannot hook into it, and "
        f"{consequence}. Install a version that hf_lora supports.",
        HfLoRAWarning,
        stacklevel=3,
    )


def _in_front_of_method(original: Callable[..., Any], ours: Callable[..., Any]) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(functools.partial(original, self), self, *args, **kwargs)

    return _marked(original, method)


def _marked(original: Any, function: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    setattr(call, _MARK, True)
    return call
