"""What a model card tells: gathered from a wrapped model, or from an adapter folder alone."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_lora.adapter_io.tasks import BY_PEFT, class_by_name, task_by_name, task_of
from hf_lora.adapter_io.tensors import moved_buffers
from hf_lora.files.biases import biases_beside
from hf_lora.files.read import AdapterFolder
from hf_lora.kinds.lora import LOW_RANK
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.model.registry import Registry
from hf_lora.planning.make import class_names
from hf_lora.planning.ties import followers


@dataclasses.dataclass(frozen=True)
class Training:
    """What a Trainer knows of how an adapter came to be."""

    title: str = ""
    """Headline of the card; by default the repo's name."""

    datasets: Sequence[str] = ()
    """Hub ids of the data sets."""

    dataset_words: str = ""
    """The data in words: what it is called, how much of it there was."""

    metrics: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    """Results on the evaluation data, by name."""

    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields for the card's metadata, such as license, language, tags and pipeline_tag."""

    processor: bool = False
    """Whether the tokenizer, or what else prepares inputs, lies beside the adapter."""

    chat: bool = False
    """Whether that tokenizer has a chat template, so that the model is to be talked with."""

    picture: str | None = None
    """Name of a picture of the losses that lies beside the adapter."""


@dataclasses.dataclass(frozen=True)
class AdapterFacts:
    """One adapter."""

    name: str
    slots: Mapping[str, LayerConfig]
    """Path of each adapted layer to its numbers."""

    trained: tuple[str, ...]
    """The modules that were trained in full, and those that are tied with them."""

    parameters: int
    bytes: int
    rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The modules of which some rows were trained, and how many."""

    buffers: tuple[str, ...] = ()
    """The buffers of the base that the training has moved."""

    biases: tuple[str, ...] = ()
    """Paths of modules of no adapted layer of which the bias alone was trained."""

    dtypes: tuple[str, ...] = ()
    """Types of its tensors, where they are known."""

    not_linear: tuple[str, ...] = ()
    """Adapted layers that are convolutions or embeddings."""

    tied: tuple[str, ...] = ()
    """Adapted layers that share their weight with another module, or may do so."""


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What the adapters belong to, and how it is loaded and called."""

    name: str
    """Its class, or words for it."""

    loader: str | None = None
    """What in transformers loads it; None: what that is cannot be told from here."""

    default_loader: bool = False
    """Whether :func:`hf_lora.from_pretrained` takes that one of itself."""

    task: str | None = None
    """The Hub's word for what it does."""

    generates: bool = False
    """Whether it writes text after a text."""

    reads: str | None = None
    """Name of its main input."""

    classes: tuple[str, ...] = ()
    """Its class and those that it is derived from, where they are known."""

    tags: tuple[str, ...] = ()
    """What somebody tagged it with."""

    labels: tuple[str, ...] = ()
    """The classes that it tells apart, where they are its own and not the base's."""


# The last weight of a head that classifies.
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
# What writes text after a text.
_GENERATING = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def adapter_facts(
    registry: Registry,
    names: Iterable[str],
    dtype: torch.dtype | None = None,
    tied: Collection[str] = (),
) -> list[AdapterFacts]:
    """Return the facts of adapters on a model, as they are when saved with ``dtype``.

    Args:
        registry, names, dtype: The adapters.
        tied: Paths of layers that share their weight with another module.
    """
    return [_adapter_facts(registry, name, dtype, tied) for name in names]


def _adapter_facts(
    registry: Registry, name: str, dtype: torch.dtype | None, tied: Collection[str]
) -> AdapterFacts:
    adapter = registry.adapter(name)
    buffers, _ = moved_buffers(registry, name)
    held = {(path, role): tensor for path, _, role, tensor in registry.tensors(name)}
    # a file has what is tied under each of its names
    again = [held[first] for first in adapter.ties.values()]
    tensors = [*held.values(), *again, *buffers.values()]
    saved = [dtype if dtype and t.is_floating_point() else t.dtype for t in tensors]
    return AdapterFacts(
        name=name,
        slots=adapter.slots,
        trained=(*adapter.trained, *followers(adapter.ties, adapter.trained)),
        rows={path: len(rows.ids) for path, rows in adapter.rows.items()},
        parameters=sum(tensor.numel() for tensor in held.values()),
        bytes=sum(t.numel() * to.itemsize for t, to in zip(tensors, saved, strict=True)),
        buffers=tuple(buffers),
        biases=adapter.biases,
        dtypes=tuple(sorted({str(to).removeprefix("torch.") for to in saved})),
        not_linear=tuple(
            path for path in adapter.slots if registry.modules[path].lora_layout is not LOW_RANK
        ),
        tied=tuple(path for path in adapter.slots if path in tied),
    )


def folder_facts(name: str, folder: AdapterFolder) -> AdapterFacts:
    """Return the facts of an adapter in a folder."""
    ties = {} if folder.own is None else folder.own.ties
    again = {folder.others.get(name) for name in ties}
    biases = biases_beside(folder.others, folder.fields, folder.trained_names)
    return AdapterFacts(
        name=name,
        slots=folder.slots,
        trained=tuple(folder.trained_names),
        rows={path: len(rows.ids) for path, rows in folder.rows.items()},
        parameters=sum(math.prod(s) for key, s in folder.file.shapes.items() if key not in again),
        bytes=folder.file.path.stat().st_size,
        not_linear=tuple(
            path for path, held in folder.factors.items() if held.layout is not LOW_RANK
        ),
        buffers=tuple(folder.own.buffers) if folder.own else (),
        biases=tuple(name.rpartition(".")[0] for name in biases),
        tied=tuple(path for path in folder.slots if path.endswith("lm_head")),
    )


def model_facts(model: nn.Module, registry: Registry, names: Iterable[str]) -> ModelFacts:
    """Return the facts of a wrapped model."""
    name = type(model).__name__
    if not type(model).__module__.startswith("transformers."):
        return ModelFacts(name, classes=tuple(class_names(model)))
    task = task_of(type(model), model.config)
    # a class of transformers loads itself where no auto class makes it
    loader = task.loader if task is not None else name
    reads = getattr(model, "main_input_name", None)
    own_head = any(registry.adapter(adapter).trained for adapter in names)
    labels = getattr(model.config, "id2label", None)
    return ModelFacts(
        name=name,
        loader=loader,
        default_loader=True,
        task=task and task.on_hub,
        generates=loader in _GENERATING and reads == "input_ids",
        reads=reads,
        classes=tuple(class_names(model)),
        tags=tuple(map(str, getattr(model, "model_tags", None) or ())),
        labels=tuple(str(labels[key]) for key in sorted(labels))
        if labels and own_head and "Classification" in name
        else (),
    )


def folder_model_facts(folder: AdapterFolder) -> ModelFacts:
    """Return the facts of the model that an adapter folder is for, as far as the files tell."""
    task = BY_PEFT.get(str(folder.fields.get("task_type")))
    named = folder.fields.get("auto_mapping")
    kind = class_by_name(named.get("base_model_class")) if isinstance(named, dict) else None
    if task is None and kind is not None:
        task = task_by_name(kind.__name__)
        reads = getattr(kind, "main_input_name", None)
    else:
        reads = "input_ids" if task is not None else None
    loader = task.loader if task is not None else kind and kind.__name__
    classifies = task is not None and "Classification" in task.loader
    return ModelFacts(
        name="base model" if kind is None else kind.__name__,
        loader=loader,
        default_loader=loader is not None,
        task=task and task.on_hub if reads == "input_ids" else None,
        generates=loader in _GENERATING and reads == "input_ids",
        reads=reads,
        classes=() if kind is None else (kind.__name__,),
        labels=_nameless_labels(folder) if classifies else (),
    )


def _nameless_labels(folder: AdapterFolder) -> tuple[str, ...]:
    """Return as many labels as the head in the folder tells apart, without their names."""
    for name, key in folder.others.items():
        if name.endswith(_HEADS):
            return tuple(f"LABEL_{number}" for number in range(folder.file.shapes[key][0]))
    return ()
