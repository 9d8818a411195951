"""The tables of scaling.md, from plans of models without weights: ``python examples/scaling.py``.

Prints the page with its tables made anew; ``--write`` puts them into the page.
"""

import re
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lora

PAGE = Path(__file__).with_name("scaling.md")
MODELS = {
    # hidden, intermediate, layers, heads; processes
    "8B": (4096, 14336, 32, 32, 8),
    "70B": (8192, 28672, 80, 64, 16),
    "405B": (16384, 53248, 126, 128, 64),
}
LORA = {"targets": "all-linear", "r": 16}
GB = 1e9


def plan(name: str) -> hf_lora.Plan:
    """The plan for a Llama 3 in bfloat16; nothing is loaded, and no memory is needed."""
    hidden, intermediate, layers, heads, world = MODELS[name]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config)
    return hf_lora.plan(model, world=world, **LORA)


def table(name: str) -> str:
    """A Markdown table of what each process keeps and sends."""
    found = plan(name)
    lines = [
        f"Llama 3 {name}, {found.world} processes: {found.base_parameters / 1e9:.2f} billion "
        f"parameters, adapter {found.parameters / 1e6:.1f} million, adapter file "
        f"{found.file_bytes / 1e6:.0f} MB.",
        "",
        "| | weights | for the moment | gradients | Adam | all on the device | on the CPU "
        "| sent a step | if all trained | a 1,000 tokens | to save |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in found.per_rank:
        numbers = (
            each.weights,
            each.gathered,
            each.gradients,
            each.optimizer,
            each.device,
            each.host,
            each.sent,
            each.sent_in_full,
            1000 * each.sent_per_token,
            each.sent_to_save,
        )
        cells = (f"{number / GB:,.2f}" if number else "-" for number in numbers)
        lines.append(f"| {each.strategy} | {' | '.join(cells)} |")
    left_out = [note for note in found.notes if "left out" in note]
    lines += ["", *(f"{note[0].upper()}{note[1:]}." for note in left_out)] if left_out else []
    return "\n".join(lines)


def page() -> str:
    """The page, with its tables made anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name in MODELS:
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        between = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)
        text = between.sub(lambda _, name=name: table(name) + "\n", text)
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
