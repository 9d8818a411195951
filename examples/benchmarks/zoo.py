"""Every model type that transformers' auto classes know, tiny and random, through hf_lora and PEFT.

    python -m examples.benchmarks.zoo run                  # all types; goes on where it ended
    python -m examples.benchmarks.zoo run llama bert       # these, anew
    python -m examples.benchmarks.zoo report               # writes zoo.md

On each: plan; wrap all-linear; the outputs are the plain model's, bit for bit; one training step
moves adapters only; save, load into a fresh base with equal outputs; PEFT reads the file with equal
outputs; a merge gives the forward's outputs; unwrapping gives the base back, bit for bit. PEFT's
own get_peft_model, step, save, load, merge and unload stand beside it. Outputs are equal if they
differ by no more than rounding does: 30 times what they answer to factors that are off by half a
unit in the last place. Each model has a process, a time limit and a memory limit of its own.
"""

import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer

import hf_lora
from examples.benchmarks import zoo_checks
from examples.benchmarks.zoo_models import types
from examples.benchmarks.zoo_report import report

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "zoo.jsonl"
SECONDS, BYTES = 40, 8 << 30
"""Of processor time, and of memory that a process allocates."""

_BUILT = "built"
_WAITS = 20
"""How many times as long it may take on a busy machine."""

app = typer.Typer(add_completion=False)


def look_at(kind: str, built: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Return what became of a type, in this process; ``built`` is called when its model runs."""
    row: dict[str, Any] = {"type": kind}
    try:
        with zoo_checks.quiet():
            case = zoo_checks.Case(kind)
    except BaseException as error:
        return row | {"result": "not here", "reason": zoo_checks.first_line(error)}
    built()
    row |= {"class": case.name, "given": sorted(case.given), "reached": [case.reached, case.leaves]}
    seen: dict[str, Any] = {}
    row |= _verdict(lambda: zoo_checks.ours(case, seen), seen, "")
    row |= {key: value for key, value in seen.items() if key != "stage"}
    row |= _verdict(lambda: zoo_checks.theirs(case, seen), seen, "peft_")
    return row


def _verdict(check: Callable[[], None], seen: dict[str, Any], prefix: str) -> dict[str, Any]:
    try:
        with zoo_checks.quiet():
            check()
        return {f"{prefix}result": "pass"}
    except zoo_checks.Failed as error:
        said = "fail", error.kind, str(error)
    except hf_lora.HfLoRAError as error:
        said = "refused", seen["stage"], " ".join(str(error).split())[:400]
    except Exception as error:
        # what PEFT says to a model that it has nothing to do with
        refused = prefix and isinstance(error, ValueError) and seen["stage"] == "wrap"
        kind = seen["stage"] if refused else f"crash in {seen['stage']}"
        said = "refused" if refused else "fail", kind, zoo_checks.first_line(error)
    return dict(zip((f"{prefix}result", f"{prefix}kind", f"{prefix}reason"), said, strict=True))


def in_a_fork(kind: str, seconds: int = SECONDS, memory: int = BYTES) -> dict[str, Any]:
    """Return what became of a type, in a process of its own that is ended at the limits."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.alarm(_WAITS * seconds)
        gc.disable()
        torch.set_num_threads(1)
        with os.fdopen(write, "w") as pipe:
            row = look_at(kind, lambda: print(_BUILT, file=pipe, flush=True))
            pipe.write(json.dumps(row))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        built, _, text = pipe.read().rpartition("\n")
    _, status, used = os.wait4(child, 0)
    if text:
        row = json.loads(text)
    else:
        code = os.waitstatus_to_exitcode(status)
        limit = code in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL)
        why = f"took more than {seconds} s" if limit else f"ended with {code}"
        row = {"type": kind, "result": "not here", "reason": f"the plain model {why}"}
        if built:
            row |= {"result": "fail", "kind": "ended", "reason": why}
    return row | {"seconds": round(used.ru_utime + used.ru_stime, 1)}


@app.command()
def run(
    kinds: Annotated[list[str] | None, typer.Argument(help="Types; all if there are none.")] = None,
    results: Annotated[Path, typer.Option(help="Lines of JSON, one a type.")] = RESULTS,
) -> None:
    """Look at types one after another; what was built and looked at is not looked at again."""
    transformers.logging.set_verbosity_error()
    look_at("llama")  # what is imported here is not imported anew by each process
    gc.freeze()  # a collection would copy all that a process has of this one
    done = set() if kinds else {row["type"] for row in rows(results) if "peft_result" in row}
    results.parent.mkdir(exist_ok=True)
    for kind in kinds or types():
        if kind in done:
            continue
        row = in_a_fork(kind)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            kind, row["result"], row.get("kind", ""), "| PEFT:", row.get("peft_result"), flush=True
        )


def rows(results: Path) -> list[dict[str, Any]]:
    """Return the newest row of each type, in order."""
    if not results.exists():
        return []
    found = (json.loads(line) for line in results.read_text().splitlines())
    return [row for _, row in sorted({row["type"]: row for row in found}.items())]


@app.command("report")
def write_report(results: Path = RESULTS, out: Path = HERE / "zoo.md") -> None:
    """Write the table."""
    libraries = (torch, transformers, peft)
    versions = ", ".join(f"{each.__name__} {each.__version__}" for each in libraries)
    out.write_text(report(rows(results), len(types()), versions))


if __name__ == "__main__":
    app()
