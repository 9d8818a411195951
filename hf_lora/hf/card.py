"""The model card of an adapter: what it is, how to use it, how it was trained if that is known."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from hf_lora.layers.names import DEFAULT
from hf_lora.model.plan import size
from hf_lora.model.registry import Adapter, Registry

LIBRARY = "hf_lora"
_PIPELINES = (
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForSequenceClassification", "text-classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForQuestionAnswering", "question-answering"),
    ("ForImageClassification", "image-classification"),
    ("ForSpeechSeq2Seq", "automatic-speech-recognition"),
)


@dataclasses.dataclass(frozen=True)
class Training:
    """What a Trainer knows of how an adapter came to be."""

    datasets: Sequence[str] = ()
    """Hub ids of the data sets."""

    dataset_words: str = ""
    """The data in words, for data that is not on the Hub."""

    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields for the card's metadata that the user gave to the Trainer: license, language, tags."""


def adapter_card(
    model: nn.Module,
    registry: Registry,
    names: Sequence[str],
    *,
    base: str | None,
    repo_id: str,
    training: Training | None = None,
) -> str:
    """Return the card of the named adapters, as Markdown with the Hub's metadata in front.

    Args:
        model: The wrapped model.
        registry: Its registry.
        names: Adapters that the repo holds.
        base: Hub id of the base model, or None if it has none.
        repo_id: Where the card will stand; used in the code snippet.
        training: What is known of the training.
    """
    training = training or Training()
    extra = dict(training.extra)
    tags = [LIBRARY, "lora", "adapter", *(extra.pop("tags", None) or [])]
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name=LIBRARY,
        pipeline_tag=_pipeline(model),
        tags=list(dict.fromkeys(tags)),
        datasets=list(training.datasets) or None,
        **extra,
    )
    title = repo_id.rsplit("/", 1)[-1]
    lines = [f"# {title}", "", _what(model, names, base), "", *_table(registry, names), ""]
    lines += ["## Use it", "", *_snippet(model, names, base, repo_id), ""]
    lines += _training_lines(training)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines).rstrip() + "\n"))


def _what(model: nn.Module, names: Sequence[str], base: str | None) -> str:
    of = f"[{base}](https://huggingface.co/{base})" if base else f"a {type(model).__name__}"
    several = f"{len(names)} LoRA adapters" if len(names) > 1 else "A LoRA adapter"
    return (
        f"{several} of {of}, in PEFT's file format: hf_lora, PEFT, vLLM and other readers of that "
        "format load it. The repo holds the adapter alone, not the base model."
    )


def _table(registry: Registry, names: Sequence[str]) -> list[str]:
    rows = ["| adapter | layers | rank | alpha | parameters | size |", "|---|---|---|---|---|---|"]
    for name in names:
        adapter = registry.adapter(name)
        tensors = [tensor for *_, tensor in registry.tensors(name)]
        count = sum(tensor.numel() for tensor in tensors)
        weight = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        rows.append(
            f"| {name} | {_layers(adapter)} | {_range(s.r for s in adapter.slots.values())} "
            f"| {_range(s.alpha for s in adapter.slots.values())} | {count:,} | {size(weight)} |"
        )
    return rows


def _layers(adapter: Adapter) -> str:
    counts: dict[str, int] = {}
    for path in adapter.slots:
        tail = path.rsplit(".", 1)[-1]
        counts[tail] = counts.get(tail, 0) + 1
    shown = [f"`{tail}` ({count})" for tail, count in sorted(counts.items())]
    return ", ".join(shown + [f"`{path}` in full" for path in adapter.trained])


def _range(values: Any) -> str:
    distinct = sorted(set(values))
    if len(distinct) == 1:
        return f"{distinct[0]:g}"
    return f"{distinct[0]:g} to {distinct[-1]:g}"


def _snippet(model: nn.Module, names: Sequence[str], base: str | None, repo_id: str) -> list[str]:
    subfolder = "" if names[0] == DEFAULT else f', subfolder="{names[0]}"'
    if base:
        load = [f'model = hf_lora.from_pretrained("{repo_id}"{subfolder})']
    else:
        load = [
            f"# model = the {type(model).__name__} that the adapter was trained on",
            f'model = hf_lora.load(model, "{repo_id}"{subfolder})',
        ]
    return ["```python", "import hf_lora", "", *load, "```", "", "`pip install hf-lora`"]


def _training_lines(training: Training) -> list[str]:
    lines: list[str] = []
    if training.datasets or training.dataset_words:
        links = [f"[{d}](https://huggingface.co/datasets/{d})" for d in training.datasets]
        lines += ["## Training data", "", ", ".join(links) or training.dataset_words, ""]
    if training.metrics:
        lines += ["## Evaluation", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in training.metrics.items()] + [""]
    if training.hyperparameters:
        lines += ["## Training", "", "| setting | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in training.hyperparameters.items()] + [
            ""
        ]
    return lines


def _pipeline(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((task for ending, task in _PIPELINES if name.endswith(ending)), None)
