"""LoRA for Hugging Face models, patched in place.

import hf_lora

model = hf_lora.wrap(model, targets=["q_proj", "v_proj"])   # same object, same class
Trainer(model=model, args=args, train_dataset=data).train()  # checkpoints hold the adapter only
model.save_pretrained("my-adapter")                          # PEFT's file format
hf_lora.push_to_hub(model, "me/my-adapter")
model = hf_lora.from_pretrained("me/my-adapter")             # base + adapter, verified
"""

import importlib
import sys
import types
import typing

from hf_lora.version import __version__ as __version__


class _Package(types.ModuleType):
    """The package as an object: its names are imported when the first of them is asked for.

    They bring torch and transformers, which take seconds; ``hf-lora --help`` needs neither.
    """

    def __getattr__(self, name: str) -> typing.Any:
        if not name.startswith("_") or name == "__all__":
            public = importlib.import_module("hf_lora.public")
            names = {each: getattr(public, each) for each in public.__all__}
            vars(self).update(names, __all__=public.__all__)
        if name in vars(self):
            return vars(self)[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=self)

    def __setattr__(self, name: str, value: typing.Any) -> None:
        # hf_lora.merge is the verb, also after somebody has imported the package of that name
        if not (name == "merge" and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *self.__all__})


sys.modules[__name__].__class__ = _Package
