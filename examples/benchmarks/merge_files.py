"""Merge an adapter into a checkpoint on disk: hf_lora file to file, PEFT in memory, and `cp -r`.

    python -m examples.benchmarks.merge_files --out merge_files.json      # needs 14 GB of disk

A random checkpoint of 1.1 billion numbers in bfloat16, in 5 files, and an adapter of rank 16 on all
of its linear layers. Each way runs in a process of its own, in turns; times are without imports and
with the files in the page cache, and the peak is that of the whole process, `VmHWM`. With
`--layers 88` and `--ways hf_lora` it is seen whether memory grows with the model. At the end a
sample of the merged tensors is compared with float64.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file

RANK, ALPHA = 16, 32.0
SHAPES = {"hidden": 2048, "ffn": 5632, "heads": 32, "kv_heads": 4, "vocab": 32_000}
WAYS = ("cp", "hf_lora", "peft")

_RUN = {
    "hf_lora": """
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from hf_lora.public import merge_checkpoint
def work(base, adapter, output):
    import warnings
    warnings.simplefilter("ignore")
    merge_checkpoint(base, adapter, output)
""",
    "peft": """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM
def work(base, adapter, output):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
""",
    "cp": """
import subprocess
def work(base, adapter, output):
    subprocess.run(["cp", "-r", base, output], check=True)
""",
}
_AFTER = """
import json, os, sys, time
def status(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) / 1024
imported, start, cpu = status("VmRSS:"), time.perf_counter(), os.times()
work(*sys.argv[1:4])
seconds, spent = time.perf_counter() - start, os.times()
print(json.dumps({
    "seconds": seconds,
    "cpu_seconds": sum(spent[:4]) - sum(cpu[:4]),
    "peak_mib": status("VmHWM:"),
    "imported_mib": imported,
}))
"""


def layers_of(layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the path and the (out, in) of each linear layer."""
    hidden, ffn = SHAPES["hidden"], SHAPES["ffn"]
    kv = hidden // SHAPES["heads"] * SHAPES["kv_heads"]
    attention = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
    for i in range(layers):
        for name, out in attention.items():
            yield f"model.layers.{i}.self_attn.{name}", (out, hidden)
        for name in ("gate_proj", "up_proj"):
            yield f"model.layers.{i}.mlp.{name}", (ffn, hidden)
        yield f"model.layers.{i}.mlp.down_proj", (hidden, ffn)


def make_base(folder: Path, layers: int, files: int, dtype: torch.dtype) -> None:
    """Write a random Llama checkpoint, one file in memory at a time."""
    hidden, vocab = SHAPES["hidden"], SHAPES["vocab"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for path, shape in layers_of(layers):
        shapes[f"{path}.weight"] = shape
    for i in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": SHAPES["ffn"],
        "num_hidden_layers": layers,
        "num_attention_heads": SHAPES["heads"],
        "num_key_value_heads": SHAPES["kv_heads"],
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = list(shapes)
    generator = torch.Generator().manual_seed(0)
    # one block of numbers for all: drawing billions of them takes longer than all that is measured
    noise = torch.empty(SHAPES["ffn"] * hidden).normal_(std=0.02, generator=generator).to(dtype)
    where = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        tensors = {}
        for name in names[i * len(names) // files : (i + 1) * len(names) // files]:
            count = torch.Size(shapes[name]).numel()
            flat = noise.repeat(-(-count // noise.numel()))[:count]
            tensors[name] = flat.roll(len(where)).view(shapes[name])
            where[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def make_adapter(folder: Path, layers: int) -> None:
    """Write a random adapter on all linear layers, as PEFT does."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path, (out, wide) in layers_of(layers):
        for role, shape in (("lora_A", (RANK, wide)), ("lora_B", (out, RANK))):
            tensor = torch.empty(shape).normal_(std=0.02, generator=generator)
            tensors[f"base_model.model.{path}.{role}.weight"] = tensor
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({path.rpartition(".")[2] for path, _ in layers_of(1)}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def run(way: str, base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """Return what one way takes, in a process of its own."""
    code = _RUN[way] + _AFTER
    command = [sys.executable, "-c", code, str(base), str(adapter), str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compared(base: Path, adapter: Path, output: Path, layers: int) -> dict[str, float]:
    """Return how many numbers of some merged tensors are float64's, rounded once."""
    equal = count = 0
    worst = 0.0
    where = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    for path, _ in list(layers_of(layers))[:: max(1, layers)]:
        name = f"{path}.weight"
        with safe_open(base / where[name], "pt") as file:
            exact = file.get_tensor(name).double()
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            a, b = (
                file.get_tensor(f"base_model.model.{path}.{role}.weight").double()
                for role in ("lora_A", "lora_B")
            )
        with safe_open(output / where[name], "pt") as file:
            found = file.get_tensor(name)
        largest = exact.abs()
        exact += b @ a * (ALPHA / RANK)
        right = exact.to(found.dtype)
        equal += int((found == right).sum())
        count += found.numel()
        largest = torch.maximum(largest, right.double().abs())
        place = torch.finfo(found.dtype).eps * 2 ** torch.floor(torch.log2(largest))
        worst = max(worst, float(((found.double() - right.double()).abs() / place).max()))
    return {"numbers": count, "equal": equal / count, "places_away": worst}


def measure(
    folder: Path, layers: int, files: int, rounds: int, ways: list[str], dtype: torch.dtype
) -> dict[str, Any]:
    """Return the best time and the largest peak of each way, and each round's."""
    base, adapter = folder / "base", folder / "adapter"
    make_base(base, layers, files, dtype)
    make_adapter(adapter, layers)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    exact = {}
    for i in range(rounds):
        for way in ways:
            output = folder / f"out-{way}"
            found[way].append(run(way, base, adapter, output))
            if way == "hf_lora" and i == rounds - 1:
                exact = compared(base, adapter, output, layers)
            shutil.rmtree(output)
            time.sleep(1)
    seconds = {way: min(each["seconds"] for each in runs) for way, runs in found.items()}
    cpu = {way: min(each["cpu_seconds"] for each in runs) for way, runs in found.items()}
    return {
        "layers": layers,
        "bytes": sum(path.stat().st_size for path in base.iterdir()),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mib": {way: max(each["peak_mib"] for each in runs) for way, runs in found.items()},
        "over_cp": {way: s / seconds["cp"] for way, s in seconds.items() if "cp" in seconds},
        "exact": exact,
        "rounds": found,
    }


def main(
    out: Annotated[Path | None, typer.Option(help="Where to write the numbers, as JSON.")] = None,
    layers: Annotated[int, typer.Option(help="22 of these are 1.1 billion numbers.")] = 22,
    files: Annotated[int, typer.Option(help="Into how many the checkpoint is cut.")] = 5,
    rounds: Annotated[int, typer.Option(help="How often each way runs.")] = 2,
    ways: Annotated[str, typer.Option(help="Which, with commas between them.")] = ",".join(WAYS),
    dtype: Annotated[str, typer.Option(help="Type of the checkpoint.")] = "bfloat16",
    folder: Annotated[Path | None, typer.Option(help="Where there is room.")] = None,
) -> None:
    """Measure, print, and leave nothing behind."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        kind = getattr(torch, dtype)
        found = measure(Path(inside), layers, files, rounds, ways.split(","), kind)
    print(json.dumps({name: found[name] for name in found if name != "rounds"}, indent=2))
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
