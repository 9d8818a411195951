"""The body of a model card, as Markdown."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hf_lora.hub.card.facts import AdapterFacts, ModelFacts, Training
from hf_lora.hub.card.snippet import MOST_LABELS, are_made_up, snippet
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.layers.names import DEFAULT
from hf_lora.planning.clients import llama_cpp_reasons, vllm_rank, vllm_reasons
from hf_lora.planning.records import served_by, size


def card_text(
    model: ModelFacts,
    adapters: Sequence[AdapterFacts],
    *,
    base: str | None,
    repo_id: str,
    training: Training,
    others: Sequence[str],
) -> str:
    """Return everything after the card's metadata; the arguments are those of ``adapter_card``."""
    names = [adapter.name for adapter in adapters]
    code = snippet(
        model,
        names,
        base=base,
        repo_id=repo_id,
        processor=training.processor,
        chat=training.chat,
    )
    lines = [
        f"# {training.title or repo_id.rsplit('/', 1)[-1]}",
        "",
        _what(model, adapters, base),
        "",
        "## Use it",
        "",
        "With hf_lora, which is installed from its source tree and is not on PyPI:",
        "",
        *_fenced("python", code),
        "",
        *_with_peft(names, repo_id),
        "",
        *_with_vllm(model, adapters, base, repo_id),
        *_besides(others),
        "## The adapters" if len(adapters) > 1 else "## The adapter",
        "",
        *_adapters(adapters, model),
        "",
        *_served(adapters, model),
        "",
        *_training(training),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _with_peft(names: Sequence[str], repo_id: str) -> list[str]:
    """Return how to use the adapters with what can be installed by name."""
    first = names[0]
    inside = "" if first == DEFAULT else f', subfolder="{first}"'
    return [
        "With PEFT (`pip install peft`), on the base that it was trained on: "
        f'`PeftModel.from_pretrained(model, "{repo_id}"{inside})`.'
    ]


def _with_vllm(
    model: ModelFacts, adapters: Sequence[AdapterFacts], base: str | None, repo_id: str
) -> list[str]:
    """Return how to serve the adapter, where vLLM takes it and it is the repo's own."""
    adapter = adapters[0]
    can = base is not None and model.generates and adapter.name == DEFAULT and adapter.slots
    if not can or _vllm(adapter, model):
        return []
    rank = vllm_rank(adapter.slots)
    name = repo_id.rsplit("/", 1)[-1]
    words = [
        f"vllm serve {base} --enable-lora --max-lora-rank {rank} \\",
        f"    --lora-modules {name}={repo_id}",
    ]
    return [f"With vLLM, as the model `{name}`:", "", *_fenced("bash", words), ""]


def _vllm(adapter: AdapterFacts, model: ModelFacts) -> list[str]:
    return list(
        vllm_reasons(
            model.classes,
            adapter.slots,
            adapter.trained,
            not_linear=adapter.not_linear,
            buffers=adapter.buffers,
            biases=adapter.biases,
            rows=adapter.rows,
        )
    )


def _served(adapters: Sequence[AdapterFacts], model: ModelFacts) -> list[str]:
    """Return what other clients make of the adapters, a line for each and each adapter."""
    lines = ["## In other software", ""]
    for adapter in adapters:
        of = f"`{adapter.name}`: " if len(adapters) > 1 else ""
        vllm = _vllm(adapter, model)
        llama_cpp = llama_cpp_reasons(
            model.classes,
            adapter.slots,
            adapter.trained,
            tied=adapter.tied,
            not_linear=adapter.not_linear,
            buffers=adapter.buffers,
            biases=adapter.biases,
            rows=adapter.rows,
        )
        lines += [f"- {of}{line}." for line in served_by(vllm, llama_cpp, adapter.slots)]
    if not model.classes:
        lines += [
            "",
            "Where the software takes adapters for this architecture, which is not known here.",
        ]
    return lines


def _what(model: ModelFacts, adapters: Sequence[AdapterFacts], base: str | None) -> str:
    of = f"[{base}](https://huggingface.co/{base})" if base else f"a {model.name}"
    several = f"{len(adapters)} LoRA adapters" if len(adapters) > 1 else "A LoRA adapter"
    whole = size(sum(adapter.bytes for adapter in adapters))
    return f"{several} for {of}: {whole} in PEFT's file format, without the base model."


def _besides(others: Sequence[str]) -> list[str]:
    if not others:
        return []
    shown = ", ".join(f"`{name}`" for name in others)
    return [f"The repo holds other adapters too: {shown}. Load one with `subfolder=`.", ""]


def _adapters(adapters: Sequence[AdapterFacts], model: ModelFacts) -> list[str]:
    """Return a table: a row for each fact of one adapter, or a row for each of several."""
    facts = [_facts(adapter) for adapter in adapters]
    if len(facts) > 1:
        heads = list(dict.fromkeys(head for each in facts for head in each))
        rows = [[each.get(head, "") for head in heads] for each in facts]
        named = [[f"`{a.name}`", *row] for a, row in zip(adapters, rows, strict=True)]
        lines = _table(["Adapter", *heads], named)
    else:
        lines = _table(["", ""], [list(pair) for pair in facts[0].items()])
    if 0 < len(model.labels) <= MOST_LABELS and not are_made_up(model.labels):
        lines += ["", f"It tells apart: {', '.join(model.labels)}."]
    return lines


def _biases(adapter: AdapterFacts) -> str:
    slots = adapter.slots.values()
    own = sum(slot.bias for slot in slots) + len(adapter.biases)
    on_b = sum(slot.lora_bias for slot in slots)
    words = (f"{own} of the base", f"{on_b} on B")
    return ", ".join(text for text, count in zip(words, (own, on_b), strict=True) if count)


def _facts(adapter: AdapterFacts) -> dict[str, str]:
    slots = adapter.slots
    dropouts = {slot.dropout for slot in slots.values()}
    facts = {
        "Targets": _tails_of(slots),
        "Rank": _spread(slots, lambda slot: slot.r),
        "Alpha": _spread(slots, lambda slot: slot.alpha),
        "Updates scaled by": _spread(slots, lambda slot: slot.scaling),
        "Dropout in training": _spread(slots, lambda slot: slot.dropout) if any(dropouts) else "",
        "Trained in full": ", ".join(f"`{name}`" for name in adapter.trained),
        "Biases": _biases(adapter),
        "Rows that were trained": ", ".join(f"{n} of `{p}`" for p, n in adapter.rows.items()),
        "Buffers that moved": _tails_of(adapter.buffers),
        "Parameters": f"{adapter.parameters:,}",
        "Size": ", ".join([size(adapter.bytes), *adapter.dtypes]),
    }
    if any(slot.rslora for slot in slots.values()):
        facts["Updates scaled by"] += " (rsLoRA)"
    return {head: value for head, value in facts.items() if value}


def _tails_of(paths: Iterable[str]) -> str:
    return ", ".join(f"`{tail}` ({count})" for tail, count in sorted(_tails(paths).items()))


def _tails(slots: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in slots:
        tail = _tail(path)
        counts[tail] = counts.get(tail, 0) + 1
    return counts


def _tail(path: str) -> str:
    return path.rsplit(".", 1)[-1] or "the model itself"


def _spread(slots: Mapping[str, LayerConfig], value: Callable[[LayerConfig], float]) -> str:
    """Return a number that all layers have; or each number with the layers that have it."""
    by_value: dict[float, set[str]] = {}
    for path, slot in slots.items():
        by_value.setdefault(value(slot), set()).add(_tail(path))
    ordered = sorted(by_value.items(), key=lambda item: (-len(item[1]), item[0]))
    if len(ordered) == 1:
        return f"{ordered[0][0]:g}"
    tails = [tail for _, found in ordered for tail in found]
    if len(tails) == len(set(tails)):
        parts = [f"{v:g} on {', '.join(f'`{t}`' for t in sorted(ts))}" for v, ts in ordered]
        return "; ".join(parts)
    return f"{min(by_value):g} to {max(by_value):g}"


def _training(training: Training) -> list[str]:
    lines: list[str] = []
    links = [f"[{name}](https://huggingface.co/datasets/{name})" for name in training.datasets]
    data = ": ".join(filter(None, [", ".join(links), training.dataset_words]))
    if data:
        lines += ["## Training data", "", f"{data.rstrip('.')}.", ""]
    if training.metrics:
        rows = [[name, _number(value)] for name, value in training.metrics.items()]
        lines += ["## Evaluation", "", *_table(["Metric", "Value"], rows), ""]
    if training.hyperparameters:
        rows = [[name, _number(value)] for name, value in training.hyperparameters.items()]
        lines += ["## Training", "", *_table(["Setting", "Value"], rows), ""]
    if training.picture:
        lines += [f"![Losses in training, by step]({training.picture})", ""]
    return lines


def _number(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return str(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(heads), "|" + "---|" * len(heads), *(_row(row) for row in rows)]


def _row(cells: Iterable[str]) -> str:
    plain = (" ".join(cell.split()).replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(plain)} |"


def _fenced(language: str, lines: Sequence[str]) -> list[str]:
    return [f"```{language}", *lines, "```"]
