"""The public verbs on a model: wrap, unwrap, plan, load, from_pretrained, push_to_hub."""

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import transformers
from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.errors import AdapterFileError, ConfigError
from hf_lora.files.read import read_folder
from hf_lora.hf import instance, peft_guard, trainer_patch
from hf_lora.hf.after_import import when_imported
from hf_lora.hf.hub import locate, push
from hf_lora.hf.loading import load_folder
from hf_lora.hf.together import folder_for_all
from hf_lora.layers.names import DEFAULT, check_adapter_name
from hf_lora.layers.offloading import guard_new_hooks
from hf_lora.model.adapters import as_config
from hf_lora.model.patch import patch, unpatch
from hf_lora.model.plan import Plan
from hf_lora.model.planning import make_plan
from hf_lora.model.registry import find

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: Model,
    targets: str | Iterable[str] | None = None,
    *,
    config: LoRAConfig | None = None,
    adapter: str = DEFAULT,
    **fields: Any,
) -> Model:
    """Patch LoRA into a model, in place, and freeze everything else.

    The model stays the object and the class that it is; no parameter of it is renamed or replaced.
    A transformers model then saves and pushes its adapter alone, and trains with the plain Trainer.

    Args:
        model: Any ``nn.Module``. Its weights may be on the meta device, to be loaded later.
        targets: Patterns of the layers to adapt, as regular expressions that match a module's
            whole dotted path or a whole dotted tail of it; or ``"all-linear"``, the default.
        config: All of it in one object, instead of ``targets`` and ``fields``.
        adapter: The adapter's name: letters, digits, ``_`` and ``-``.
        **fields: Fields of :class:`LoRAConfig`: ``r, alpha, dropout, rslora, init, overrides,
            exclude, train, dtype``.

    Returns:
        The same model.

    Raises:
        ConfigError: A field is unknown or wrong.
        TargetError: A pattern matches nothing or nothing that can be adapted, or a layer is smaller
            than the rank; all problems are listed.
        StateError: Wrapped already, or a module to train in full is without weights.

    The model is as it was after any of these.

    Example:
        >>> model = wrap(nn.Sequential(nn.Linear(4, 4)), targets="0", r=2)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B']
    """
    patch(model, as_config(targets, config, fields), adapter)
    _hook(model)
    return model


def unwrap(model: Model) -> Model:
    """Take every adapter off: the module tree, flags and methods as they were before.

    A merged model is unmerged first; :func:`merge_and_unwrap` keeps the merged weights.

    Returns:
        The model itself, also if a DDP or compiled wrapper of it was given.

    Raises:
        StateError: The model is not wrapped.
    """
    inner = unpatch(model)
    instance.uninstall(inner)
    return inner  # type: ignore[return-value]


def plan(
    model: nn.Module,
    targets: str | Iterable[str] | None = None,
    *,
    config: LoRAConfig | None = None,
    world: int = 1,
    **fields: Any,
) -> Plan:
    """Find out what :func:`wrap` would do, without doing it.

    Works on a model without weights (on the meta device) as well.

    Args:
        model: Any ``nn.Module``.
        targets, config, **fields: As for :func:`wrap`.
        world: Among how many processes the training is to be shared. ``plan.per_rank`` then says
            what each keeps and sends, in bytes, for each way to share it (DDP, FSDP2, ...).

    Returns:
        A :class:`Plan`: ``print(plan)`` is a table, ``plan.targets`` are records, ``plan.problems``
        is what would make ``wrap`` refuse.

    Raises:
        ConfigError: A field is unknown or wrong, or ``world`` is no number of processes.
    """
    if not isinstance(world, int) or isinstance(world, bool) or world < 1:
        raise ConfigError(f"world is a number of processes, 1 or more, not {world!r}")
    return make_plan(model, as_config(targets, config, fields), world)


def apply_lora(model: Model, r: int, alpha: float = 16.0) -> Model:
    """Turn every linear layer of a model into a :class:`LoRALinear`, in place, the head included.

    The short form that LoRA is taught with; :func:`wrap` chooses layers and does more.

    Args:
        model: Any ``nn.Module``; it may itself be an ``nn.Linear``.
        r: Rank.
        alpha: Strength; updates are scaled by ``alpha / r``.

    Returns:
        The same model, its own parameters frozen.

    Raises:
        ConfigError, TargetError, StateError: As for :func:`wrap`.
    """
    return wrap(model, targets=".*", r=r, alpha=alpha)


def load(
    model: Model,
    source: str | os.PathLike[str],
    *,
    adapter: str = DEFAULT,
    trainable: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    check_base: bool = True,
) -> Model:
    """Attach a saved adapter to a base model, or to one that has adapters already.

    Every tensor of the file lands in a place of its shape, and every place is filled, on the base
    that the adapter was trained on; otherwise one error lists everything that is wrong and the
    model is as it was.

    Args:
        model: The base model. If it is wrapped already the adapter is added, but not activated.
        source: A folder, or the id of a repo on the Hub.
        adapter: The name that it gets here.
        trainable: Whether to go on training it.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder inside the source, for adapters that were saved under a name.
        token: For private repos; by default the one that you are logged in with.
        check_base: Whether to compare the base's weights with those that it was trained on.

    Returns:
        The same model.

    Raises:
        AdapterFileError: The files are missing, unsound, or of a kind that is not supported.
        AdapterMismatchError: They do not fit this model.
        BaseMismatchError: They fit, but were trained on other weights.
        HubError: The Hub refused or could not be reached.
        StateError: The model has an adapter of that name, is merged, or has no weights yet to be
            compared, which only ``check_base=False`` allows.
    """
    check_adapter_name(adapter)
    with folder_for_all(
        model, lambda: locate(source, revision=revision, subfolder=subfolder, token=token)
    ) as folder:
        load_folder(model, folder, adapter=adapter, trainable=trainable, check_base=check_base)
    found = find(model)
    assert found is not None
    _hook(found[0])
    return model


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    model_class: Any = None,
    trainable: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    check_base: bool = True,
    **model_kwargs: Any,
) -> Any:
    """Load an adapter together with the base model that it names.

    Args:
        source: A folder, or the id of a repo on the Hub.
        model_class: What loads the base, such as ``AutoModelForSequenceClassification``; by default
            the auto class for the adapter's task, or, if it names none, the class that the base was
            saved from.
        trainable, revision, subfolder, token, check_base: As for :func:`load`.
        **model_kwargs: Handed to ``model_class.from_pretrained``, for instance ``dtype`` or
            ``device_map``.

    Returns:
        The base model with the adapter attached and active.

    Raises:
        AdapterFileError: As for :func:`load`, or the adapter names no base.
        HubError, BaseMismatchError, AdapterMismatchError: As for :func:`load`.
        OSError: transformers cannot load the base.
    """
    folder = locate(source, revision=revision, subfolder=subfolder, token=token)
    content = read_folder(folder)
    if content.base is None:
        raise AdapterFileError(
            f"{folder} names no base model (base_model_name_or_path); load the base yourself and "
            "call hf_lora.load(model, source)."
        )
    if content.revision is not None:
        model_kwargs.setdefault("revision", content.revision)
    if token is not None:
        model_kwargs.setdefault("token", token)
    loader = model_class or _class_for(content.fields.get("task_type"), content.base, model_kwargs)
    model = loader.from_pretrained(content.base, **model_kwargs)
    return load(model, folder, trainable=trainable, check_base=check_base)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    adapter: str | None = None,
    private: bool | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Push the adapters and a model card to the Hub, in one commit.

    Args:
        model: A wrapped model.
        repo_id: ``user/name``; the repo is made if there is none.
        adapter: Push this one only; by default all.
        private: Whether a new repo is private; by default what the account says. A repo that is
            there keeps its visibility; True for one that is public is refused.
        dtype: Type of the saved tensors; by default their own.
        revision: Branch to push to, made if there is none; or ``refs/pr/NUMBER``.
        create_pr: Open a pull request, against main, instead of committing.
        token: By default the one that you are logged in with.
        commit_message: By default it names the adapters.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        StateError: The model is not wrapped.
        ConfigError: ``dtype`` is none that an adapter can have, or a revision with ``create_pr``.
        HubError: The Hub refused or went away. Nothing is committed by halves; push again.
    """
    return push(
        model,
        repo_id,
        adapter=adapter,
        private=private,
        dtype=dtype,
        revision=revision,
        create_pr=create_pr,
        token=token,
        commit_message=commit_message,
    )


def _hook(model: nn.Module) -> None:
    instance.install(model)
    trainer_patch.install()
    peft_guard.install()
    when_imported("accelerate.hooks", guard_new_hooks)


_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_CONFIG_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "gguf_file")


def _class_for(task: Any, base: str, model_kwargs: dict[str, Any]) -> Any:
    """Return the class of transformers that loads the base for an adapter's task."""
    if task in _CLASSES:
        return getattr(transformers, _CLASSES[task])
    kwargs = {name: model_kwargs[name] for name in _CONFIG_KWARGS if name in model_kwargs}
    saved_from = transformers.AutoConfig.from_pretrained(base, **kwargs).architectures or [""]
    found = getattr(transformers, saved_from[0], None)
    if found is None:
        raise AdapterFileError(
            f"The adapter names no task that hf_lora knows ({task!r}), and its base {base} was "
            f"saved from {saved_from[0] or 'a class that it does not name'}; pass model_class=..."
        )
    return found
