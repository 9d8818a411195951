"""The code in a model card: it runs as it stands, with what the Hub holds."""

import json
from collections.abc import Sequence

from hf_lora.hub.card.facts import ModelFacts
from hf_lora.layers.names import DEFAULT

_WIDTH = 88
QUESTION = "Who are you?"
BEGINNING = "Once upon a time"
"""What a chat, and a text, begin with in examples: nothing of what an adapter was trained on."""

MOST_LABELS = 32
"""More are counted, not named."""

Code = tuple[list[str], list[str]]
"""Import statements, and the lines after them."""


def snippet(
    model: ModelFacts,
    names: Sequence[str],
    *,
    base: str | None,
    repo_id: str,
    processor: bool,
    chat: bool = False,
) -> list[str]:
    """Return the lines that load the adapters, and call the model where it is known how.

    Args:
        model: What the adapters belong to.
        names: Adapters in the repo; the first is loaded with the base.
        base: Hub id of the base model, or None if others cannot have it.
        repo_id: Where the adapters are.
        processor: Whether the tokenizer lies beside them, and not only beside the base.
        chat: Whether that tokenizer has a chat template.
    """
    first, *others = names
    whole = base is not None and model.loader is not None
    imports, lines = _whole(model, first, repo_id) if whole else _onto(model, first, base, repo_id)
    lines += [
        _call("hf_lora.load", ["model", f'"{repo_id}"', f'adapter="{name}"', *_subfolder(name)])
        for name in others
    ]
    if others:
        lines.append(f'hf_lora.activate(model, "{others[-1]}")  # or a list: they add up')
    source = repo_id if processor else base
    more, use = _use(model, source, chat=chat) if source and whole else ([], [])
    return [*_imports([*imports, *more]), "", *lines, *use]


def _whole(model: ModelFacts, name: str, repo_id: str) -> Code:
    """Load base and adapter at once."""
    arguments = [f'"{repo_id}"', *_subfolder(name)]
    if not model.default_loader:
        arguments.append(f"model_class={model.loader}")
    if model.labels:
        # the base may have a head of its own, for other classes
        arguments += [_labels(model.labels), "ignore_mismatched_sizes=True"]
    imports = [] if model.default_loader else [f"from transformers import {model.loader}"]
    return imports, [_call("model = hf_lora.from_pretrained", arguments)]


def _onto(model: ModelFacts, name: str, base: str | None, repo_id: str) -> Code:
    """Load the adapter onto a base model that the reader has."""
    origin = f"loaded from {base}" if base else "with the weights that it was trained on"
    return [], [
        f"# model: the {model.name} of this adapter, {origin}",
        _call("hf_lora.load", ["model", f'"{repo_id}"', *_subfolder(name)]),
    ]


def _use(model: ModelFacts, source: str, *, chat: bool) -> Code:
    if model.task == "image-classification":
        return ["import PIL.Image", "from transformers import AutoImageProcessor"], [
            f'processor = AutoImageProcessor.from_pretrained("{source}")',
            "",
            'image = PIL.Image.open("image.jpg").convert("RGB")',
            'inputs = processor(image, return_tensors="pt")',
            "print(model.config.id2label[model(**inputs).logits.argmax().item()])",
        ]
    if model.reads != "input_ids":
        return [], []
    if model.generates and chat:
        call = [
            f'messages = [{{"role": "user", "content": "{QUESTION}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
            "outputs = model.generate(**inputs, max_new_tokens=200)",
            'answer = outputs[0, inputs["input_ids"].shape[1] :]',
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]
    elif model.generates:
        call = [
            f'inputs = tokenizer("{BEGINNING}", return_tensors="pt")',
            "outputs = model.generate(**inputs, max_new_tokens=50)",
            "print(tokenizer.decode(outputs[0], skip_special_tokens=True))",
        ]
    elif model.task == "text-classification":
        call = [
            'inputs = tokenizer("A text to classify.", return_tensors="pt")',
            "print(model.config.id2label[model(**inputs).logits.argmax().item()])",
        ]
    else:
        call = ['outputs = model(**tokenizer("A text.", return_tensors="pt"))']
    make = [f'tokenizer = AutoTokenizer.from_pretrained("{source}")', ""]
    return ["from transformers import AutoTokenizer"], make + call


def are_made_up(labels: Sequence[str]) -> bool:
    """Say whether these are the names that transformers gives where nobody gave others."""
    return all(label == f"LABEL_{number}" for number, label in enumerate(labels))


def _labels(labels: Sequence[str]) -> str:
    if are_made_up(labels) or len(labels) > MOST_LABELS:
        return f"num_labels={len(labels)}"
    pairs = (f"{n}: {json.dumps(label, ensure_ascii=False)}" for n, label in enumerate(labels))
    return f"id2label={{{', '.join(pairs)}}}"


def _subfolder(name: str) -> list[str]:
    return [] if name == DEFAULT else [f'subfolder="{name}"']


def _call(function: str, arguments: Sequence[str]) -> str:
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{function}(", *(f"    {argument}," for argument in arguments), ")"])


def _imports(statements: Sequence[str]) -> list[str]:
    """Return import statements, those from transformers in one, as a formatter orders them."""
    lead = "from transformers import "
    names = sorted({line.removeprefix(lead) for line in statements if line.startswith(lead)})
    others = {line for line in statements if not line.startswith(lead)}
    plain = sorted({"import hf_lora", *others}, key=str.lower)
    return [*plain, *([lead + ", ".join(names)] if names else [])]
