"""Measure every row of the report and write it: tables, a picture, versions and hardware.

    python -m examples.benchmarks.report --out examples/benchmarks/report   # some fifteen minutes

Each row is measured in a process of its own, its arms in turns; see `train_step`, `saved_bytes`
and `limits`. With `--curves loss_curves.json` the losses of `loss_curves` are part of it.
"""

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from examples.benchmarks.arms import ARMS

ROWS: dict[str, tuple[list[str], float | None]] = {
    "h576 f1536, bf16, all-linear r16": (["--rounds", "25"], 1.15),
    "the same, dropout 0.05": (["--dropout", "0.05", "--rounds", "15"], 1.30),
    "the same, float32": (["--dtype", "float32", "--rounds", "10"], 1.08),
    "the same, bf16, 48 tokens": (["--tokens", "48", "--rounds", "40"], None),
    "h2048 f5632, 2 layers, bf16, r16": (
        ["--hidden", "2048", "--ffn", "5632", "--layers", "2", "--rounds", "12"],
        1.10,
    ),
    "h2048 f5632, 2 layers, bf16, r64": (
        ["--hidden", "2048", "--ffn", "5632", "--layers", "2", "--r", "64", "--rounds", "12"],
        1.20,
    ),
    "SmolLM2-135M with head, bf16, q and v, r8": (
        ["--layers", "30", "--head", "--targets", "qv", "--r", "8", "--rounds", "10"],
        1.04,
    ),
}
"""Name of a row, to the arguments of `train_step` and the ratio to reach."""

SAVED = {"bf16": [], "bf16, dropout 0.05": ["--dropout", "0.05"], "float32": ["--dtype", "float32"]}

LIMITS = {
    "h576 f1536, bf16, r16": [],
    "the same, dropout 0.05": ["--dropout", "0.05", "--rounds", "15"],
    "the same, float32": ["--dtype", "float32", "--rounds", "10"],
    "h2048 f5632, 2 layers, bf16, r64": [
        *("--hidden", "2048", "--ffn", "5632", "--layers", "2", "--r", "64", "--rounds", "12"),
    ],
}

COLORS = {"peft": "tab:orange", "hf_lora": "tab:blue", "hf_lora_fused": "tab:green"}
"""Of the curves; see `loss_curves` for what hf_lora_fused is."""

Times = dict[str, dict[str, dict[str, float]]]
"""Name of a row, and of an arm, to seconds and the ratio; see `train_step.Timed`."""


def ran(module: str, arguments: list[str]) -> Any:
    """Return what one of the benchmarks measures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"examples.benchmarks.{module}", *arguments]
        command += ["--out", str(out)]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        return json.loads(out.read_text())


def processor() -> str:
    """Return the processor's name as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    amx = " with AMX" if "amx_bf16" in flags else ""
    return f"{names[0] if names else platform.processor()}{amx}"


def least(row: dict[str, dict[str, float]], arm: str) -> float:
    """Return the ratio of the shortest times."""
    return row[arm]["seconds"] / row["frozen"]["seconds"]


def table(times: Times) -> list[str]:
    """Return the rows of the table of ratios."""
    lines = [f"| work, 512 tokens | {' | '.join(ARMS)} | to reach |", "|---" * 7 + "|"]
    for name, (_, goal) in ROWS.items():
        row = times[name]
        ratios = " | ".join(f"{least(row, arm):.2f} ({row[arm]['ratio']:.2f})" for arm in ARMS)
        lines.append(f"| {name} | {ratios} | {f'{goal:.2f}' if goal else ''} |")
    return lines


def saved_table(counts: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Return the rows of the table of bytes above the frozen model."""
    lines = ["| bytes per token and layer | frozen | peft | peft16 | unfused | hf_lora |"]
    lines.append("|---" * 6 + "|")
    for name, row in counts.items():
        frozen = row["frozen"]["per_token"]
        rest = " | ".join(f"{row[arm]['per_token'] - frozen:+,.0f}" for arm in ARMS[1:])
        lines.append(f"| {name} | {frozen:,.0f} | {rest} |")
    return lines


def limit_table(limits: dict[str, dict[str, Any]]) -> list[str]:
    """Return where the difference to the frozen model lies, a column for each work."""
    lines = [
        f"| part of the frozen step | {' | '.join(limits)} |",
        "|---" * (len(limits) + 1) + "|",
    ]

    def add(name: str, values: Iterable[str]) -> None:
        lines.append(f"| {name} | {' | '.join(values)} |")

    found = list(limits.values())
    for name in ("limit", "limit of hf_lora", "hf_lora"):
        arms = [one["arms"] for one in found]
        add(f"**{name}**", (f"{least(row, name):.3f} ({row[name]['ratio']:.3f})" for row in arms))
    for kind in found[0]["kinds"]["hf_lora"]:
        parts = (one["kinds"]["hf_lora"][kind] - one["kinds"]["frozen"][kind] for one in found)
        add(kind, (f"{part:+.3f}" for part in parts))
    return lines


def curve_table(runs: list[dict[str, Any]]) -> list[str]:
    """Return what `loss_curves` found, a line a run."""
    lines = ["| library | seed | mean of the last 50 steps | held out |", "|---" * 4 + "|"]
    for run in sorted(runs, key=lambda run: (run["library"], run["seed"])):
        tail = sum(run["losses"][-50:]) / len(run["losses"][-50:])
        lines.append(f"| {run['library']} | {run['seed']} | {tail:.3f} | {run['held_out']:.3f} |")
    return lines


def draw(times: Times, runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios as bars, and the losses smoothed over 20 steps."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if runs else 1, squeeze=False)[0]
    for i, arm in enumerate(ARMS[1:]):
        heights = [row[arm]["ratio"] for row in times.values()]
        axes[0].barh([k - 0.3 + 0.2 * i for k in range(len(heights))], heights, 0.2, label=arm)
    axes[0].set_yticks(range(len(times)), list(times), fontsize=8)
    axes[0].axvline(1, color="black", linewidth=0.8)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="time of a step, frozen model = 1")
    axes[0].legend()
    for run in runs:
        color = COLORS[run["library"]]
        losses = run["losses"]
        smooth = [sum(losses[k : k + 20]) / 20 for k in range(len(losses) - 20)]
        label = run["library"] if run["seed"] == 0 else None
        axes[1].plot(smooth, color=color, label=label, linewidth=1)
    if runs:
        axes[1].set(xlabel="step", ylabel="loss, mean of 20 steps", yscale="log")
        axes[1].legend()
    figure.savefig(path, dpi=110)


def main(
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("report"),
    curves: Annotated[Path | None, typer.Option(help="what loss_curves wrote")] = None,
    measured: Annotated[Path | None, typer.Option(help="a measured.json, to write anew")] = None,
) -> None:
    """Measure all and write README.md, measured.json and report.png."""
    out.mkdir(parents=True, exist_ok=True)
    runs = json.loads(curves.read_text()) if curves else []
    if measured:
        write(out, **json.loads(measured.read_text()), runs=runs)
        return
    times: Times = {}
    for name, (arguments, _) in ROWS.items():
        times[name] = ran("train_step", arguments)["arms"]
        print(name, times[name], flush=True)
    saved = {name: ran("saved_bytes", arguments) for name, arguments in SAVED.items()}
    limits = {name: ran("limits", arguments) for name, arguments in LIMITS.items()}
    write(out, times, saved, limits, runs)


def write(out: Path, times: Times, saved: Any, limits: Any, runs: list[dict[str, Any]]) -> None:
    """Write the report of what was measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [
        "# What training costs",
        "",
        f"{processor()}, one thread; {versions}. Made by `python -m examples.benchmarks.report`.",
        "",
        "## Time",
        "",
        "A step is one forward and backward pass of a Llama; the frozen model, with gradients",
        "flowing through it to its input, counts as 1. `peft` is PEFT as it comes, `peft16` has",
        "its adapters in the model's own type; `unfused` is hf_lora's formula in PyTorch's own",
        "operations, `hf_lora` is hf_lora as it comes. The arms take turns in one process. The",
        "first number compares the shortest of all rounds, the one in brackets is the median of",
        "each round's own ratio, which is what to look at where a machine's speed changes.",
        "",
        *table(times),
        "",
        "## How close that is to the limit",
        "",
        "The limit is the frozen step plus the products that any exact LoRA needs, with dropout",
        "its masks too, on buffers that are not in the cache, with nothing around them (`limits`).",
        "The limit of hf_lora has in addition what its promises need: x and h are computed again,",
        "so that nothing is kept, and factors and their gradients are float32. Below them is what",
        "each kind of operation takes more in a step with hf_lora, by PyTorch's profiler.",
        "",
        *limit_table(limits),
        "",
        "An update's products are narrow, so they are bound by memory and not by arithmetic: with",
        "h576 r16 they are a fifteenth of the multiplications of the base's own products, and take",
        "a third of their time or more. A goal below the limit cannot be reached with PyTorch's",
        "operations on this processor, and one below the limit of hf_lora not without more memory.",
        "",
        "## Memory",
        "",
        "What autograd keeps for the backward pass, above the frozen model's own:",
        "",
        *saved_table(saved),
        "",
        "hf_lora keeps one more thing, once and not for each token: its factors in the type that",
        "is computed in.",
        "",
        "![ratios and losses](report.png)",
        "",
    ]
    if runs:
        steps = len(runs[0]["losses"])
        lines += ["## Quality", ""]
        lines += [f"Losses of SmolLM2-135M in {steps} steps on the quickstart's words:", ""]
        lines += curve_table(runs)
        lines += ["", "`hf_lora_fused` takes the path of long sequences in these short ones, too."]
    (out / "README.md").write_text("\n".join(lines) + "\n")
    record = {"times": times, "saved": saved, "limits": limits}
    (out / "measured.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(times, runs, out / "report.png")


if __name__ == "__main__":
    typer.run(main)
