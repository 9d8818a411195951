"""Acting on a module of another library when it is imported, instead of importing it for that.

Importing Trainer or the pipelines takes seconds, which only those should pay who use them.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """Call ``action`` with the module of this name, now if it is imported, else when it is.

    Also again if the module is reloaded. Registering the same action twice is registering it once.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    actions = _finder.actions.setdefault(name, [])
    if action not in actions:
        actions.append(action)
    if name in sys.modules:
        # waits for an import that another thread is in the middle of
        action(importlib.import_module(name))


def cancel(name: str, action: Action) -> None:
    """Take back what :func:`when_imported` registered."""
    actions = _finder.actions.get(name, [])
    if action in actions:
        actions.remove(action)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: has the actions run as soon as one of the modules is executed."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return what the other finders find, with a loader that acts afterwards, or None."""
        if not self.actions.get(fullname):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for action in list(self.actions[fullname]):
                    action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _Finder()
