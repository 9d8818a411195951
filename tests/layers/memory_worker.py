"""Run by test_offload_memory.py in a process of its own: a model that is larger than its memory."""

import json
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import disk_offload
from accelerate.utils import offload_state_dict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import hf_lora

MiB = 2**20
ROOM = 96 * MiB
"""What the process may take beyond what Python, torch and transformers have taken already."""

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(1, 17).view(2, 8)


def make(folder: Path) -> int:
    """Write the model as a checkpoint and as accelerate offloads it; returns its bytes."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(folder / "base", max_shard_size="50MB")
    offload_state_dict(folder / "offload", model.state_dict())
    return sum(p.numel() * p.element_size() for p in model.parameters())


def work(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Wrap, take a step, save the adapter, and merge; returns what the model says after each."""
    torch.manual_seed(1)
    hf_lora.wrap(model, r=4)
    model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=5.0)
    loss = model.train()(TOKENS, labels=TOKENS).loss
    loss.backward()
    optimizer.step()
    hf_lora.save(model, folder)
    said = {"loss": float(loss.detach()), "trained": answer(model)}
    hf_lora.merge(model)
    said["merged"] = answer(model)
    hf_lora.unmerge(model)
    said["unmerged"] = answer(model)
    with hf_lora.no_adapter(model):
        said["base"] = answer(model)
    return said


@torch.no_grad()
def answer(model: nn.Module) -> list[float]:
    """A few numbers of what the model says."""
    return model.eval()(TOKENS).logits[:, -1, :4].flatten().tolist()


def taken() -> int:
    """Return the bytes of memory that the process can write to, in use or not: what is limited."""
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def whole(folder: Path) -> str:
    """Load the model into memory; returns what comes of it."""
    try:
        LlamaForCausalLM.from_pretrained(folder / "base")
    except (RuntimeError, MemoryError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "fits"


def in_a_fork(call: Callable[[], str]) -> str:
    """Return what a call returns in a copy of this process, which keeps what a failure leaves."""
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(here, call().encode())
        os._exit(0)
    os.close(here)
    os.waitpid(child, 0)
    with os.fdopen(there) as pipe:
        return pipe.read()


def limited(folder: Path) -> dict[str, Any]:
    """Set the limit; load the model as a whole, which fails; then work with it from the disk."""
    tiny = LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 16, "num_hidden_layers": 1}))
    work(tiny, folder / "tiny")  # whatever is imported or started late is there now
    del tiny
    limit = taken() + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    told: dict[str, Any] = {"whole": in_a_fork(lambda: whole(folder))}
    # accelerate's init_empty_weights makes every weight for a moment, which is too much here
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)  # no checkpoint has its buffers
    disk_offload(model, folder / "offload", execution_device=torch.device("cpu"))
    told |= work(model, folder / "offloaded")
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(limited(Path(sys.argv[1]))))
