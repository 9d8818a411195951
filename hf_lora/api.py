"""The public verbs on a model: wrap, unwrap, plan, load, from_pretrained, push_to_hub."""

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from hf_lora.adapter_io.base_loading import load_base, other_class
from hf_lora.adapter_io.collective import share_folder
from hf_lora.adapter_io.labels import label_arguments
from hf_lora.adapter_io.load import load_folder
from hf_lora.adapter_io.match import MISSING
from hf_lora.adapter_io.token_rows import make_room
from hf_lora.adapter_io.vocabulary import fit_vocabulary
from hf_lora.compat.torch_checkpoint import keep_functions_of_deepspeed
from hf_lora.config import LoRAConfig
from hf_lora.errors import AdapterFileError, AdapterMismatchError, BaseMismatchError, ConfigError
from hf_lora.files.read import read_folder
from hf_lora.hub.download import locate
from hf_lora.hub.upload import push
from hf_lora.integrations import diffusers_models, model_methods
from hf_lora.integrations.import_hooks import when_imported
from hf_lora.integrations.own_methods import take_off
from hf_lora.integrations.quantize_experts import quantize_experts as pack_experts
from hf_lora.layers.names import DEFAULT, check_adapter_name
from hf_lora.layers.offload import guard_new_hooks
from hf_lora.layers.routing import as_at_first
from hf_lora.model.adapters import as_config
from hf_lora.model.patch import patch
from hf_lora.model.registry import find, returned_by_wrap
from hf_lora.model.transaction import Transaction
from hf_lora.peft_names import PeftConfig
from hf_lora.planning.cores import core_of
from hf_lora.planning.make import make_plan
from hf_lora.planning.records import Plan

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    model: Model,
    targets: str | Iterable[str] | LoRAConfig | PeftConfig | None = None,
    *,
    config: LoRAConfig | PeftConfig | None = None,
    adapter: str = DEFAULT,
    tokenizer: Any = None,
    **fields: Any,
) -> Model:
    """Patch LoRA into a model, in place, and freeze everything else.

    The model stays the object and the class that it is; no parameter of it is renamed or replaced.
    A transformers model then saves and pushes its adapter alone, and trains with the plain Trainer.

    Args:
        model: Any ``nn.Module``. Its weights may be on the meta device, to be loaded later. Of a
            ``SentenceTransformer`` or ``CrossEncoder`` it is the transformers model inside.
        targets: Patterns of the layers to adapt, as regular expressions that match a module's
            whole dotted path or a whole dotted tail of it; or a word: ``"all-linear"``,
            the default, ``"attention"``, ``"mlp"`` or ``"experts"`` (see :class:`LoRAConfig`). Or
            a whole configuration, as ``config``.
        config: All of it in one object, instead of ``targets`` and ``fields``: a
            :class:`LoRAConfig`, or PEFT's ``LoraConfig`` (see :meth:`LoRAConfig.from_peft`).
        adapter: The adapter's name: letters, digits, ``_`` and ``-``.
        tokenizer: What knows the tokens that ``train_rows`` names; numbers of rows need none.
        **fields: Fields of :class:`LoRAConfig`: ``r, alpha, dropout, rslora, init, overrides, bias,
            exclude, train, train_rows, dtype``.

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
    inner = core_of(model) or model
    with Transaction(inner) as change:
        patch(inner, as_config(targets, config, fields, tokenizer), adapter)
        _hook(inner)
        change.commit()
    return model


def unwrap(model: Model) -> Model:
    """Take every adapter off: the module tree, flags and methods as they were before.

    A merged model is unmerged first; :func:`merge_and_unwrap` keeps the merged weights.

    Returns:
        What was wrapped, also if a DDP or compiled wrapper of it is given; of sentence-transformers
        the whole model, as from :func:`wrap`.

    Raises:
        StateError: The model is not wrapped.
    """
    return returned_by_wrap(model, take_off(model))  # type: ignore[return-value]


def plan(
    model: nn.Module,
    targets: str | Iterable[str] | LoRAConfig | PeftConfig | None = None,
    *,
    config: LoRAConfig | PeftConfig | None = None,
    world: int = 1,
    tokenizer: Any = None,
    **fields: Any,
) -> Plan:
    """Find out what :func:`wrap` would do, without doing it.

    Works on a model without weights (on the meta device) as well.

    Args:
        model: Any ``nn.Module``.
        targets, config, **fields: As for :func:`wrap`.
        world: Among how many processes the training is to be shared. ``plan.per_rank`` then says
            what each keeps and sends, in bytes, for each way to share it (DDP, FSDP2, ...).
        tokenizer: As for :func:`wrap`.

    Returns:
        A :class:`Plan`: ``print(plan)`` is a table, ``plan.targets`` are records, ``plan.problems``
        is what would make ``wrap`` refuse.

    Raises:
        ConfigError: A field is unknown or wrong, or ``world`` is no number of processes.
    """
    if not isinstance(world, int) or isinstance(world, bool) or world < 1:
        raise ConfigError(f"world is a number of processes, 1 or more, not {world!r}")
    inner = core_of(model) or model
    config = as_config(targets, config, fields, tokenizer)
    found = find(inner)
    return make_plan(inner, config, world, found[1].adapted() if found else None)


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
    missing: str = "error",
    replace: bool = False,
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
        missing: ``"zero"`` if you know that a layer which the configuration promises and which has
            no tensors was not changed: it then stays as it is. By default that is an error.
        replace: Whether to put it in the place of an adapter of that name, in use where that was.
            Where layers, ranks and types are the same only values change: tensors stay the objects
            that they are, for optimizers and compiled code.

    Returns:
        The same model.

    Raises:
        AdapterFileError: The files are missing, unsound, or of a kind that is not supported.
        AdapterMismatchError: They do not fit this model.
        BaseMismatchError: They fit, but were trained on other weights.
        HubError: The Hub refused or could not be reached.
        ConfigError: ``missing`` is neither ``"error"`` nor ``"zero"``.
        StateError: The model has an adapter of that name and ``replace`` is not said, or that is
            merged or in use by another thread; or the model has no weights yet to be compared,
            which only ``check_base=False`` allows.
    """
    check_adapter_name(adapter)
    if missing not in MISSING:
        raise ConfigError(f"missing is one of {', '.join(map(repr, MISSING))}, not {missing!r}")
    inner = core_of(model) or model
    with (
        share_folder(
            inner, lambda: locate(source, revision=revision, subfolder=subfolder, token=token)
        ) as folder,
        Transaction(inner) as change,
    ):
        load_folder(
            inner,
            folder,
            change,
            adapter=adapter,
            trainable=trainable,
            check_base=check_base,
            missing=missing,
            replace=replace,
        )
        found = find(inner)
        assert found is not None
        _hook(found[0])
        change.commit()
    return model


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    model_class: Any = None,
    trainable: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    check_base: bool = True,
    missing: str = "error",
    quantize_experts: bool = False,
    **model_kwargs: Any,
) -> Any:
    """Load an adapter together with the base model that it names.

    Args:
        source: A folder, or the id of a repo on the Hub.
        base: The base model, instead of the one that the adapter names: a folder, an id on the Hub,
            or a model that is loaded already.
        model_class: What loads the base, such as ``AutoModelForSequenceClassification``; by default
            the auto class for the adapter's task if it has one for this base, or the class that the
            adapter names, or the class that the base was saved from.
        trainable, revision, subfolder, token, check_base, missing: As for :func:`load`.
        quantize_experts: Whether to pack the base's experts in 4 bits when it is loaded, before the
            adapter is; see :func:`quantize_experts`.
        **model_kwargs: Handed to ``model_class.from_pretrained``, for instance ``dtype`` or
            ``device_map``.

    Returns:
        The base model with the adapter attached and active.

    Raises:
        AdapterFileError: As for :func:`load`, or the adapter names no base, or no class for it is
            known.
        BaseLoadError: The base cannot be found or loaded.
        ConfigError: A loaded base together with what would load one.
        HubError, BaseMismatchError, AdapterMismatchError: As for :func:`load`.
    """
    folder = locate(source, revision=revision, subfolder=subfolder, token=token)
    if isinstance(base, nn.Module):
        own = {"model_class": model_class is not None, "quantize_experts": quantize_experts}
        given = [*(name for name, some in own.items() if some), *model_kwargs]
        if given:
            raise ConfigError(f"The base is loaded already, so {', '.join(given)} cannot be used.")
        return load(base, folder, trainable=trainable, check_base=check_base, missing=missing)
    content = read_folder(folder)
    asked = content.base if base is None else os.fspath(base)
    if asked is None:
        raise AdapterFileError(
            f"{folder} names no base model (base_model_name_or_path); name it: "
            "hf_lora.from_pretrained(source, base=...) takes a folder, an id or a model."
        )
    if content.revision is not None and asked == content.base:
        model_kwargs.setdefault("revision", content.revision)
    if token is not None:
        model_kwargs.setdefault("token", token)
    model_kwargs |= label_arguments(content, model_kwargs)
    model, why = load_base(content, asked, model_class, model_kwargs)
    fit_vocabulary(model, content)
    make_room(model, content)
    if quantize_experts:
        pack_experts(model)
    try:
        return load(model, folder, trainable=trainable, check_base=check_base, missing=missing)
    except BaseMismatchError:
        raise
    except AdapterMismatchError as error:
        raise other_class(error, model, why) from error


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
    model_methods.install(model)
    model_methods.install_patches()
    diffusers_models.install()
    when_imported("accelerate.hooks", guard_new_hooks)
    when_imported("deepspeed.runtime.activation_checkpointing.checkpointing", _keep_functions)


def _keep_functions(module: Any) -> None:
    keep_functions_of_deepspeed(module, as_at_first)
