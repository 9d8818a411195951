# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-lora[train]"]
# ///
"""Train an adapter on a file of rows, and ask it something: a script that brings what it needs.

    uv run examples/finetune.py MODEL rows.jsonl --prompt "..."

`uv` reads the block above and makes an environment of it (https://peps.python.org/pep-0723/); until
hf-lora is on PyPI, say where its wheel is: `uv run --find-links dist examples/finetune.py ...`.
What the rows are, such as chats or prompts with completions, is told from their columns.
"""

import argparse
from pathlib import Path

import hf_lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, or an id on the Hub")
    parser.add_argument("rows", type=Path, help=".jsonl, .json, .csv, .parquet or .txt")
    parser.add_argument("--prompt", help="what to ask afterwards")
    parser.add_argument("--output", type=Path, default=Path("adapter"))
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()

    recipe = {
        "base": args.model,
        "data": {"train": args.rows},
        "lora": {"r": args.rank},
        "trainer": {"lr": args.lr, "epochs": args.epochs, "logging_steps": 1},
        "output": args.output,
    }
    trained = hf_lora.train(recipe)
    print(trained)
    if args.prompt:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(trained.adapter)
        model = hf_lora.from_pretrained(trained.adapter)
        inputs = tokenizer(args.prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
