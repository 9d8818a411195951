"""transformers' Trainer and hf_lora: resume, best model, pushes and model card, gradients checked.

Four private or public methods of the class ``Trainer`` are wrapped once; the wrappers act on our
models only and otherwise call the original at once. Subclasses (Seq2SeqTrainer, TRL's trainers)
inherit them. Whoever wants no patch uses :class:`LoRATrainerMixin`, which is the same functions.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_lora.errors import HfLoRAError, StateError
from hf_lora.files.content import CONFIG_FILE, WEIGHTS_FILE
from hf_lora.files.read import is_adapter_folder
from hf_lora.hf.card import Training, adapter_card
from hf_lora.hf.hub import CARD_FILE
from hf_lora.hf.loading import restore
from hf_lora.hf.saving import adapter_folder, base_name
from hf_lora.model.registry import find

_MODULE = "transformers.trainer"
_MARK = "_hf_lora_wrapped"
_PRIVATE = ("_load_from_checkpoint", "_load_best_model", "_push_from_checkpoint")


def install() -> None:
    """Wrap Trainer's methods now, or when its module is imported: that import takes seconds."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        _patch(module)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class LoRATrainerMixin:
    """What hf_lora does for Trainer, as a mixin: ``class Mine(LoRATrainerMixin, Trainer)``.

    Not needed with the plain Trainer, which :func:`hf_lora.wrap` prepares.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        original = super()._load_from_checkpoint  # type: ignore[misc]
        _load_from_checkpoint(original, self, resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        _load_best_model(super()._load_best_model, self)  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        _push_from_checkpoint(super()._push_from_checkpoint, self, checkpoint_folder)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write our model card; takes the arguments of ``Trainer.create_model_card``."""
        _create_model_card(super().create_model_card, self, *args, **kwargs)  # type: ignore[misc]


def _load_from_checkpoint(
    original: Callable[..., None], trainer: Any, checkpoint: str, model: Any = None
) -> None:
    target = trainer.model if model is None else model
    if not _restores_itself(trainer, target):
        original(checkpoint, model)
        return
    restore_checkpoint(target, checkpoint)


def _load_best_model(original: Callable[[], None], trainer: Any) -> None:
    if not _restores_itself(trainer, trainer.model):
        original()
        return
    restore_checkpoint(trainer.model, trainer.state.best_model_checkpoint)


def restore_checkpoint(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """Give a wrapped model the adapters of a checkpoint that was saved from it.

    Raises:
        AdapterFileError: Unsound, or of other layers, ranks or strengths.
        StateError: The checkpoint holds other adapters than the model has.
    """
    found = find(model)
    assert found is not None
    inner, registry = found
    folders = {name: adapter_folder(Path(checkpoint), name) for name in registry.adapters}
    missing = [name for name, folder in folders.items() if not is_adapter_folder(folder)]
    if missing:
        raise StateError(
            f"The checkpoint {checkpoint} holds no weights for the adapters {', '.join(missing)}, "
            "which the model has; it was not saved from a model wrapped like this one."
        )
    for name, folder in folders.items():
        restore(inner, registry, name, folder)


def _restores_itself(trainer: Any, model: Any) -> bool:
    """Say whether the adapters' files are the checkpoint: not where a framework keeps its own."""
    own_format = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return not own_format and isinstance(model, nn.Module) and find(model) is not None


def _push_from_checkpoint(original: Callable[[str], None], trainer: Any, checkpoint: str) -> None:
    found = find(trainer.model)
    if found is not None and trainer.is_world_process_zero():
        for name in found[1].adapters:
            source = adapter_folder(Path(checkpoint), name)
            target = adapter_folder(Path(trainer.args.output_dir), name)
            target.mkdir(parents=True, exist_ok=True)
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                if (source / file).is_file():
                    shutil.copyfile(source / file, target / file)
    original(checkpoint)


def _create_model_card(
    original: Callable[..., None],
    trainer: Any,
    language: Any = None,
    license: str | None = None,
    tags: Any = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: Any = None,
    dataset_tags: Any = None,
    dataset: Any = None,
    dataset_args: Any = None,
    **others: Any,
) -> None:
    found = find(trainer.model)
    given = {
        "language": language,
        "license": license,
        "tags": tags,
        "model_name": model_name,
        "finetuned_from": finetuned_from,
        "tasks": tasks,
        "dataset_tags": dataset_tags,
        "dataset": dataset,
        "dataset_args": dataset_args,
    }
    if found is None:
        original(**given, **others)
        return
    if not trainer.is_world_process_zero():
        return
    model, registry = found
    base = finetuned_from or base_name(model)
    card = adapter_card(
        model,
        registry,
        list(registry.adapters),
        base=None if base is None or os.path.isdir(base) else base,
        repo_id=getattr(trainer, "hub_model_id", None) or model_name or "my-adapter",
        training=_training(trainer, language, license, tags, dataset_tags, dataset),
    )
    Path(trainer.args.output_dir).mkdir(parents=True, exist_ok=True)
    Path(trainer.args.output_dir, CARD_FILE).write_text(card, encoding="utf-8")


def _training(
    trainer: Any, language: Any, license: str | None, tags: Any, dataset_tags: Any, dataset: Any
) -> Training:
    from transformers.modelcard import extract_hyperparameters_from_trainer, parse_log_history

    _, _, results = parse_log_history(trainer.state.log_history)
    metrics = {
        name: value
        for name, value in (results or {}).items()
        if isinstance(value, (int, float)) and name not in ("epoch", "step")
    }
    extra = {"language": language, "license": license, "tags": _as_list(tags)}
    size = _length(trainer.train_dataset)
    return Training(
        datasets=_as_list(dataset_tags),
        dataset_words=", ".join(_as_list(dataset)) or (f"{size:,} examples." if size else ""),
        metrics=metrics,
        hyperparameters=extract_hyperparameters_from_trainer(trainer),
        extra={name: value for name, value in extra.items() if value},
    )


def _as_list(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        return 0


_WRAPPED: dict[str, Callable[..., None]] = {
    "_load_from_checkpoint": _load_from_checkpoint,
    "_load_best_model": _load_best_model,
    "_push_from_checkpoint": _push_from_checkpoint,
    "create_model_card": _create_model_card,
}


def _patch(module: Any) -> None:
    trainer = module.Trainer
    missing = [name for name in _WRAPPED if not callable(getattr(trainer, name, None))]
    if missing:
        raise HfLoRAError(
            f"This transformers' Trainer has no {', '.join(missing)}, which hf_lora needs to "
            "resume and to load the best model; install a version that hf_lora supports."
        )
    for name, ours in _WRAPPED.items():
        original = getattr(trainer, name)
        if not getattr(original, _MARK, False):
            setattr(trainer, name, _wrapper(original, ours))
    # its base class is as slow to import as Trainer itself, which is there by now
    callback = importlib.import_module("hf_lora.hf.gradient_check").GradientCheck
    if callback not in module.DEFAULT_CALLBACKS:
        module.DEFAULT_CALLBACKS.append(callback)


def _wrapper(original: Callable[..., Any], ours: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(functools.partial(original, self), self, *args, **kwargs)

    setattr(method, _MARK, True)
    return method


class _WhenImported(importlib.abc.MetaPathFinder):
    """Steps aside at once for every module but Trainer's, which it patches after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return Trainer's own spec with a loader that patches afterwards, or None."""
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                _patch(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
