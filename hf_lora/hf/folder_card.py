"""The model card of a saved adapter folder, made from its files alone."""

from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData

from hf_lora.files.read import AdapterFolder
from hf_lora.hf.card import LIBRARY, Training
from hf_lora.layers.names import DEFAULT
from hf_lora.model.plan import size

_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def folder_card(
    adapters: Mapping[str, AdapterFolder],
    repo_id: str,
    *,
    base: str | None,
    training: Training | None = None,
) -> str:
    """Return the card of saved adapters, as Markdown with the Hub's metadata in front.

    Args:
        adapters: Name of each adapter to its folder.
        repo_id: Where the card will stand; used in the code snippet.
        base: Hub id of the base model, or None if it has none.
        training: What is known of the training.
    """
    training = training or Training()
    first = next(iter(adapters.values()))
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name=LIBRARY,
        pipeline_tag=_PIPELINES.get(first.fields.get("task_type") or ""),
        tags=[LIBRARY, "lora", "adapter"],
        datasets=list(training.datasets) or None,
    )
    several = f"{len(adapters)} LoRA adapters" if len(adapters) > 1 else "A LoRA adapter"
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    lines = [
        f"# {repo_id.rsplit('/', 1)[-1]}",
        "",
        f"{several}{of}, in PEFT's file format: hf_lora, PEFT, vLLM and other readers of that "
        "format load it. The repo holds the adapter alone, not the base model.",
        "",
        "| adapter | layers | rank | alpha | file |",
        "|---|---|---|---|---|",
        *(_row(name, folder) for name, folder in adapters.items()),
        "",
        "## Use it",
        "",
        *_snippet(next(iter(adapters)), repo_id, base),
        *_training(training),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _row(name: str, folder: AdapterFolder) -> str:
    counts: dict[str, int] = {}
    for path in folder.slots:
        tail = path.rsplit(".", 1)[-1]
        counts[tail] = counts.get(tail, 0) + 1
    layers = [f"`{tail}` ({count})" for tail, count in sorted(counts.items())]
    layers += [f"`{trained}` in full" for trained in folder.trained_names]
    ranks = sorted({slot.r for slot in folder.slots.values()})
    alphas = sorted({slot.alpha for slot in folder.slots.values()})
    weight = size(folder.file.path.stat().st_size)
    return f"| {name} | {', '.join(layers)} | {_span(ranks)} | {_span(alphas)} | {weight} |"


def _span(ordered: list) -> str:
    first, last = f"{ordered[0]:g}", f"{ordered[-1]:g}"
    return first if first == last else f"{first} to {last}"


def _snippet(name: str, repo_id: str, base: str | None) -> list[str]:
    subfolder = "" if name == DEFAULT else f', subfolder="{name}"'
    if base:
        load = [f'model = hf_lora.from_pretrained("{repo_id}"{subfolder})']
    else:
        load = [
            "# model = the base model that the adapter was trained on",
            f'model = hf_lora.load(model, "{repo_id}"{subfolder})',
        ]
    return ["```python", "import hf_lora", "", *load, "```", "", "`pip install hf-lora`", ""]


def _training(training: Training) -> list[str]:
    lines: list[str] = []
    data = [f"[{d}](https://huggingface.co/datasets/{d})" for d in training.datasets]
    words = ", ".join(data) or training.dataset_words
    if words:
        lines += ["## Training data", "", words, ""]
    for headline, head, values in (
        ("Evaluation", "metric", {k: f"{v:.4g}" for k, v in training.metrics.items()}),
        ("Training", "setting", training.hyperparameters),
    ):
        if values:
            lines += [f"## {headline}", "", f"| {head} | value |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in values.items()] + [""]
    return lines
