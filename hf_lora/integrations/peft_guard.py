"""Keeping PEFT from putting its layers around ours, whose registry would not know of them.

Nothing is imported for that: PEFT is reached once somebody else imports it.
"""

import functools
from typing import Any

from torch import nn

from hf_lora.errors import StateError
from hf_lora.integrations.import_hooks import when_imported
from hf_lora.layers.kind import Patched

_MARK = "_hf_lora_guard"


def install() -> None:
    """Guard PEFT's injection of adapters, now if PEFT is imported, and otherwise when it will be.

    All of ``get_peft_model``, ``PeftModel.from_pretrained`` and ``inject_adapter_in_model`` go
    through it, before anything of the model has changed.
    """
    when_imported("peft.tuners.tuners_utils", _guard)


def _guard(module: Any) -> None:
    owner = getattr(module, "BaseTuner", None)
    inject = getattr(owner, "inject_adapter", None)
    if owner is None or inject is None or hasattr(inject, _MARK):
        return  # of a PEFT that works otherwise, nothing is guarded

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        path = next((path for path, m in model.named_modules() if isinstance(m, Patched)), None)
        if path is not None:
            raise StateError(
                f"{path or 'This layer'} carries an adapter of hf_lora, and PEFT cannot go on top: "
                "use hf_lora.add_adapter for another adapter, or hf_lora.unwrap(model) first."
            )
        return inject(self, model, *args, **kwargs)

    setattr(inject_adapter, _MARK, True)
    owner.inject_adapter = inject_adapter
