"""What a model that was merged for good keeps of hf_lora: a method, and with it what was merged."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hf_lora.files.other_kind import check_no_adapter


@dataclasses.dataclass(frozen=True)
class SaveMerged:
    """``save_pretrained`` of a merged model: in full, but not into an adapter's folder."""

    names: tuple[str, ...]
    """The adapters that were merged, in order."""

    earlier: Callable[..., Any] | None
    """What the model itself had as ``save_pretrained`` before; by default its class's."""

    def __call__(
        self, model: nn.Module, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Save as ever, or raise SaveError."""
        check_no_adapter(Path(save_directory))
        save = self.earlier or functools.partial(type(model).save_pretrained, model)  # type: ignore[attr-defined]
        return save(save_directory, *args, **kwargs)
