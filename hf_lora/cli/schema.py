"""What the JSON of each command holds; other fields may be added, none of these goes away."""

from collections.abc import Mapping
from types import MappingProxyType

from hf_lora.cli.output import Result
from hf_lora.errors import ConfigError

_ERROR = "instead of all this, with exit code 1 (130: Ctrl-C): its type and message"

_MADE = {
    "title": "what was done",
    "base": "the base that it names",
    "error": "how far it is from what was asked for, as a share of that: 0 where it is exact",
    "layers": "path to r, alpha, norm and error of each layer",
    "trained": "modules that it has in full",
    "told": "what is worth knowing, a line each",
    "directory": "the folder that was written",
}

SCHEMAS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "init": {
            "recipe": "the file that was written",
            "form": "what the rows are",
            "columns": "the form's name of a column to the one in the data",
            "rows": "rows that were looked at, 10,000 at most",
            "faulty": "of these, those that cannot be used",
            "median": "tokens of a row in the middle",
            "longest": "tokens of the longest row",
            "max_length": "tokens that rows are cut to",
            "batch_size": "rows at a time",
            "accumulation": "times that, in a step",
            "memory": "bytes that a step takes, estimated",
            "available": "bytes that there are",
            "trained": "parameters of the adapter",
        },
        "init --example": {"recipe": "the file that was written", "files": "that, and its data"},
        "train --dry-run": {
            "rows": "the first rows, as pieces of text with their tokens, learned or not",
            "train_examples": "rows to train on",
            "eval_examples": "rows to evaluate on",
            "counts": "rows that were read, cut, dropped, and unused beyond their share",
            "tokens": "in an epoch",
            "learned": "of these, those that count for the loss",
            "steps": "of the optimizer",
            "memory": "bytes, estimated: base_bytes + adapter_bytes + step_bytes",
            "available_bytes": "that there are",
            "seconds": "estimated",
        },
        "train": {
            "adapter": "the folder",
            "best": "the run that was kept: learning_rate, steps, train_loss, eval_loss, "
            "eval_accuracy, seconds, diverged",
            "tries": "all runs, one for each learning rate",
            "examples": "rows: train, eval, rows, cut, dropped, unused",
            "bytes": "of the adapter's file",
            "pushed": "the address on the Hub, or null",
        },
        "plan": {
            "model": "its class",
            "targets": "layers that get an update: path, host, shapes, parameters, bytes",
            "trained": "modules trained in full",
            "left_out": "path of what a pattern means but cannot adapt, to the reason",
            "problems": "why wrap would refuse; exit code 1 if there are any",
            "warnings": "what may make an update useless",
            "parameters": "that train",
            "base_parameters": "of the base",
            "weight_bytes": "of the adapter",
            "gradient_bytes": "of its gradients",
            "adam_bytes": "of Adam's moments for them",
            "file_bytes": "of the file that will be saved",
            "vllm": "why vLLM could not serve it; empty if it can",
        },
        "show": {
            "folder": "where it is, or the repo",
            "base": "the base that it names",
            "task": "PEFT's word for it",
            "layers": "of each path, r, alpha, in_features, out_features, parameters, norm",
            "trained_names": "modules trained in full",
            "dead": "paths of layers that change nothing",
            "not_finite": "tensors with numbers that are not finite; exit code 1 if there are any",
            "parameters": "in all",
            "file_bytes": "of the file",
            "causes": "what it is made of, to bytes",
        },
        "show --heatmap": {
            "heatmap": "the picture that was written, beside all that show says",
            "heatmap_of": "what its colours mean",
            "shares": "path to norm of the update over that of the weight, where the base is here",
        },
        "generate": {
            "adapter": "as it was named",
            "base": "where the base came from",
            "answers": "prompt and text of each; with --compare also base, its text without",
        },
        "chat": {"base": "where the base came from", "turns": "by, prompt and text of each"},
        "eval": {
            "rows": "how many",
            "data": "as it was named",
            "base": "loss (nats a token), accuracy, perplexity without the adapter",
            "adapter": "the same with it",
        },
        "merge": {
            "directory": "the folder that was written",
            "base": "what was merged into",
            "adapters": "each adapter to its factor",
            "dtype": "of the weights",
            "tensors": "what was changed, tensor by tensor",
            "rounded_away": "the share of the change that the output's type cannot hold",
            "verified": "with --verify, the largest difference from float64",
        },
        "export": {
            "adapter": "as it was named",
            "clients": "without --client: client, works, reasons, way of each",
        },
        "similarity": {
            "one": "the first adapter",
            "other": "the second",
            "total": "cosine of all updates together",
            "layers": "path to cosine and both norms of each layer",
        },
        "combine": _MADE,
        "resize": _MADE,
        "extract": _MADE,
        "diff": {
            "kind": "adapters or checkpoints",
            "one": "the first",
            "other": "the second",
            "equal": "whether they differ in nothing",
            "config": "field to what each says",
            "only_in_one": "names that the other lacks",
            "only_in_other": "names that the first lacks",
            "compared": "what both have: name, equal, distance, cosine, norms",
        },
        "report": {
            "page": "the file that was written",
            "bytes": "of it",
            "adapters": "of each name, norm, dead, clients, and layers: path, norm, values, "
            "effective_rank, relative",
            "similarities": "cosine of each with each, null where no layer is common",
        },
        "push": {"url": "of the commit or pull request", "files": "that were pushed"},
        "pull": {"folder": "where it is"},
        "skill": {"skill": "the text of the file"},
        "schema": {"COMMAND": "its fields, each with its meaning"},
    }
)
"""Command to the fields of its JSON, each with what it means."""


def describe_schema(name: str | None) -> Result:
    """Show what the JSON of one command holds, or of all.

    Raises:
        ConfigError: There is no such command.
    """
    wanted = {n: f for n, f in SCHEMAS.items() if name is None or n.split()[0] == name}
    if not wanted:
        raise ConfigError(f"there is no command {name!r}; there are {', '.join(SCHEMAS)}")
    lines = []
    for command, fields in wanted.items():
        lines.append(f"hf-lora {command} --json")
        lines += [f"  {field}: {meaning}" for field, meaning in fields.items()]
    lines.append(f"error: {_ERROR}")
    data = {command: dict(fields) for command, fields in wanted.items()}
    return Result(data=data, text="\n".join(lines))
