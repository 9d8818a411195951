"""The modules of a model that carry adapters, by their paths."""

from collections import UserDict
from typing import Any, cast

from hf_lora.layers.kind import Patched
from hf_lora.layers.weakly import Weakly


class ModulesByPath(UserDict[str, Patched]):
    """Path to module; the model itself, where it is a layer that is adapted, is held weakly."""

    def __setitem__(self, path: str, module: Patched) -> None:
        self.data[path] = module if path else Weakly(module)  # type: ignore[assignment]

    def __getitem__(self, path: str) -> Patched:
        held: Any = self.data[path]
        return cast(Patched, held.module) if isinstance(held, Weakly) else held
