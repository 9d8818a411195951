"""The page for whoever comes from PEFT: each pair of snippets gives equal results."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import hf_lora
from hf_lora.peft_names import CALLS, FIELDS

peft = pytest.importorskip("peft")

PAGE = (Path(__file__).parents[2] / "examples/docs/coming-from-peft.md").read_text()
_PAIR = re.compile(
    r'^### (.*?)\n\n```python title="PEFT"\n(.*?)^```\n\n```python title="hf_lora"\n(.*?)^```',
    re.MULTILINE | re.DOTALL,
)
PAIRS = _PAIR.findall(PAGE)
INPUTS = {"input_ids": torch.arange(12).view(2, 6)}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each factor of the adapter "default", under a name that is the same for both libraries."""
    for name, parameter in model.named_parameters():
        if re.search(r"\.lora_[AB](\.default\.weight)?$", name):
            short = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            yield short, parameter


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give factors values that follow from their names."""
    for name, parameter in factors(model):
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        values = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
        parameter.data.normal_(0, 0.3, generator=values)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters on it that PEFT has saved."""
    folder = tmp_path_factory.mktemp("folders")
    llama().save_pretrained(folder / "base")
    for seed, (name, targets, r) in enumerate(
        [("my-adapter", ["q_proj", "v_proj"], 4), ("my-next", ["q_proj", "v_proj"], 4),
         ("my-other", ["q_proj", "up_proj"], 2)]
    ):  # fmt: skip
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=r, lora_alpha=6, target_modules=targets)
        )
        fill(model, seed)
        model.save_pretrained(folder / name)
    return folder


def run(code: str, folder: Path) -> Any:
    """Run a snippet, and return its ``result`` or else what its ``model`` answers."""
    args = TrainingArguments(
        "out", max_steps=1, logging_steps=1, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, seed=3,
    )  # fmt: skip
    row = {"input_ids": torch.arange(6), "labels": torch.arange(6)}
    base_model = LlamaForCausalLM.from_pretrained(folder / "base")
    here = {"base_model": base_model, "inputs": INPUTS, "args": args, "data": [row] * 8}
    exec(compile(code, "snippet", "exec"), here)
    if "result" in here:
        return here["result"]
    model = here["model"]
    assert isinstance(model, nn.Module)
    found = dict(factors(model))
    if all(not factor.any() for name, factor in found.items() if name.endswith("lora_B")):
        fill(model)
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


@pytest.mark.parametrize(("title", "theirs", "ours"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_both_sides_give_the_same(
    title: str, theirs: str, ours: str, folders: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(folders)
    there, here = run(theirs, folders), run(ours, folders)
    if isinstance(there, torch.Tensor):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            plain = llama()(**INPUTS).logits
        assert torch.equal(there, plain) == ("off" in title)
    else:
        assert here == (pytest.approx(there, rel=1e-5) if isinstance(there, float) else there)


def test_there_are_twenty_five_of_them_or_more():
    assert len(PAIRS) >= 25
    assert PAGE.count("```python") == 2 * len(PAIRS)


def test_the_tables_have_every_field_and_every_call():
    """What PEFT's configuration has, and what errors here know the name of."""
    named = set(re.findall(r"`([A-Za-z_.]+)", PAGE.split("## All fields of LoraConfig")[1]))
    fields = {name for name in vars(peft.LoraConfig()) if not name.startswith("_")}
    assert fields <= named
    extra = {"rank", "lora_r", "autocast_adapter_dtype", "adapter_name", "low_cpu_mem_usage"}
    assert set(FIELDS) - extra <= named
    calls = {name for name in CALLS if not re.match("(Auto)?PeftModelFor", name)}
    assert calls - {name for name in calls if name in PAGE} == set()


def test_what_the_tables_name_here_is_there():
    rows = [line for line in PAGE.splitlines() if re.match(r"\| `", line)]
    ours = set(re.findall(r"`([a-z_]+)(?:\(|`)", " ".join(row.split(" | ")[-1] for row in rows)))
    words = {"layers", "q_proj", "experts", "kaiming", "gaussian", "model", "name", "weight", "r"}
    assert ours - words <= {*hf_lora.__all__, *vars(hf_lora.LoRAConfig()), "get_adapter_state_dict"}
