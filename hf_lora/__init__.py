"""LoRA for Hugging Face models, patched in place.

Example::

    import hf_lora

    model = hf_lora.wrap(model, targets=["q_proj", "v_proj"])    # same object, same class
    Trainer(model=model, args=args, train_dataset=data).train()  # checkpoints: the adapter only
    model.save_pretrained("my-adapter")                          # PEFT's file format
    hf_lora.push_to_hub(model, "me/my-adapter")
    model = hf_lora.from_pretrained("me/my-adapter")             # base + adapter, verified

The names live in ``hf_lora.public``, imported when the first of them is asked for: it brings
torch and transformers, which take seconds, and ``hf-lora --help`` needs neither.
"""

import importlib
import typing

from hf_lora.version import __version__ as __version__


def __getattr__(name: str) -> typing.Any:
    """Import the public names when the first of them, or their list, is asked for."""
    if name == "__all__" or not name.startswith("_"):
        public = importlib.import_module("hf_lora.public")
        globals().update({each: getattr(public, each) for each in public.__all__})
        globals()["__all__"] = public.__all__
        if name in globals():
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{public.hint(name)}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__getattr__("__all__")})
