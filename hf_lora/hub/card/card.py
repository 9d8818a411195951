"""The model card of adapters: what they are, how to use them, how they were trained if it is known.

Equal facts give equal bytes, so a push that changes nothing makes no commit. The last line of a
card is a seal, by which a later push tells a card that somebody has edited since.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from hf_lora.files.read import AdapterFolder
from hf_lora.hub.card.facts import (
    AdapterFacts,
    ModelFacts,
    Training,
    adapter_facts,
    folder_facts,
    folder_model_facts,
    model_facts,
)
from hf_lora.hub.card.snippet import BEGINNING, QUESTION
from hf_lora.hub.card.text import card_text
from hf_lora.model.registry import Registry

CARD_FILE = "README.md"
LIBRARY = "hf_lora"
_FORMAT = "peft"
"""What the Hub is told: it counts the downloads of adapters by their format."""

_SEAL = re.compile(r"\n<!-- hf_lora ([0-9a-f]{16}) -->\n*\Z")
# Metrics that the Hub knows under these names.
_KNOWN_METRICS = {
    "accuracy", "bleu", "cer", "chrf", "exact_match", "f1", "matthews_correlation", "mae",
    "mean_iou", "mse", "pearsonr", "perplexity", "precision", "recall", "rouge", "rouge1",
    "rouge2", "rougel", "rougelsum", "sacrebleu", "spearmanr", "wer",
}  # fmt: skip


def adapter_card(
    model: nn.Module,
    registry: Registry,
    names: Sequence[str],
    *,
    base: str | None,
    repo_id: str,
    training: Training | None = None,
    dtype: torch.dtype | None = None,
    others: Sequence[str] = (),
) -> str:
    """Return the card of adapters on a model, as Markdown with the Hub's metadata in front.

    Args:
        model: The wrapped model.
        registry: Its registry.
        names: Adapters that the repo holds.
        base: Hub id of the base model, or None if it has none.
        repo_id: Where the card will stand; used in the code snippet.
        training: What is known of the training.
        dtype: Type in which the adapters are saved; by default their own.
        others: Adapters that the repo holds besides, of which nothing is known here.
    """
    facts = adapter_facts(registry, names, dtype, _tied(model))
    about = model_facts(model, registry, names)
    return _card(about, facts, base, repo_id, training or Training(), others)


def folder_card(
    adapters: Mapping[str, AdapterFolder],
    repo_id: str,
    *,
    base: str | None,
    training: Training | None = None,
) -> str:
    """Return the card of saved adapters, from their files alone.

    Args:
        adapters: Name of each adapter to its folder.
        base, repo_id, training: As for :func:`adapter_card`.
    """
    facts = [folder_facts(name, folder) for name, folder in adapters.items()]
    about = folder_model_facts(next(iter(adapters.values())))
    return _card(about, facts, base, repo_id, training or Training(), ())


def _tied(model: nn.Module) -> set[str]:
    """Return the paths of the modules that share a parameter with another one."""
    named: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return set().union(*(paths for paths in named.values() if len(paths) > 1))


def is_untouched(card: str) -> bool:
    """Say whether hf_lora wrote this card and nobody has changed it since."""
    found = _SEAL.search(card.replace("\r\n", "\n"))
    return found is not None and found[1] == _digest(card.replace("\r\n", "\n")[: found.start()])


def _card(
    model: ModelFacts,
    adapters: Sequence[AdapterFacts],
    base: str | None,
    repo_id: str,
    training: Training,
    others: Sequence[str],
) -> str:
    metadata = _metadata(model, base, repo_id, training)
    text = card_text(model, adapters, base=base, repo_id=repo_id, training=training, others=others)
    whole = f"---\n{metadata}\n---\n\n{text}"
    return f"{whole}\n<!-- hf_lora {_digest(whole)} -->\n"


def _metadata(model: ModelFacts, base: str | None, repo_id: str, training: Training) -> str:
    extra = {name: value for name, value in training.extra.items() if value}
    tags = extra.pop("tags", None) or []
    task = extra.pop("pipeline_tag", model.task)
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name=_FORMAT,
        pipeline_tag=task,
        widget=_widget(model, training.chat),
        tags=[LIBRARY, "lora", "adapter", *model.tags, *tags],
        datasets=list(training.datasets) or None,
        metrics=sorted(_known_metrics(training)) or None,
        **_results(task, repo_id, training),
        **extra,
    )
    return data.to_yaml()


def _widget(model: ModelFacts, chat: bool) -> list[dict[str, Any]] | None:
    """Return what the Hub offers to try, if the model is to be asked something.

    Never a row that it was trained on: somebody else's words may be in it.
    """
    if not model.generates:
        return None
    if chat:
        return [{"messages": [{"role": "user", "content": QUESTION}]}]
    return [{"text": BEGINNING}]


def _known_metrics(training: Training) -> dict[str, int | float]:
    plain = {name.lower().replace(" ", "_"): value for name, value in training.metrics.items()}
    return {name: value for name, value in plain.items() if name in _KNOWN_METRICS}


def _results(task: str | None, repo_id: str, training: Training) -> dict[str, Any]:
    """Return the results as the Hub lists them, if it is clear what they were measured on."""
    metrics = _known_metrics(training)
    if not metrics or not task or len(training.datasets) != 1:
        return {}
    (dataset,) = training.datasets
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_value=value,
        )
        for name, value in sorted(metrics.items())
    ]
    return {"model_name": repo_id.rsplit("/", 1)[-1], "eval_results": results}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
