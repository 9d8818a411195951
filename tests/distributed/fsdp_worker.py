"""Run by test_fsdp.py in each process: models under PyTorch's fully_shard, and what they leave."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hf_lora
from hf_lora.compat.dtensor import full_tensor
from hf_lora.errors import HfLoRAError
from hf_lora.integrations.trainer.hooks import restore_checkpoint
from hf_lora.model.registry import wrapped
from tests.integrations import training

LORA: dict[str, Any] = {"targets": ["q_proj", "v_proj", "down_proj"], "r": 4}
WITH_HEAD: dict[str, Any] = {**LORA, "train": ["lm_head"]}
IDS = torch.randint(1, training.VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(5))
STEPS = 3


def shard(model: Any, sizes: tuple[int, ...] | None = None) -> Any:
    """Shard a model over all processes, layer by layer, as transformers and accelerate do.

    Args:
        model: The model.
        sizes: Replicas and processes in each, instead of one over all.
    """
    names = ("dp_replicate", "fsdp") if sizes else ("fsdp",)
    sizes = sizes or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    return model


def wrap(model: Any, seed: int = 1, **fields: Any) -> Any:
    """Wrap as LORA says, from a seed."""
    with training.seeded(seed):
        return hf_lora.wrap(model, **(LORA | fields))


def train(model: Any, ids: torch.Tensor) -> Iterator[float]:
    """Take some steps of AdamW; yield each loss after its backward."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        yield float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What the model says to all rows."""
    return model.eval()(input_ids=IDS).logits


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """All adapter tensors of a model, whole."""
    _, registry = wrapped(model)
    return {
        key: full_tensor(tensor.detach()).clone()
        for (*_, key), (*_, tensor) in zip(
            registry.keys("default"), registry.tensors("default"), strict=True
        )
    }


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """All gradients of a model, whole."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: full_tensor(grad).clone() for name, grad in found.items()}


def base_kept(model: Any) -> bool:
    """Whether the model without its adapters says what the base says."""
    with hf_lora.no_adapter(model):
        said = logits(model)
    return torch.equal(said, logits(training.llama().to(model.dtype)))


def refusal(call: Any) -> str:
    """The name of the error that a call raises, and the message's beginning."""
    try:
        call()
    except HfLoRAError as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "none"


def training_runs(folder: Path) -> dict[str, Any]:
    """Train models that are wrapped before they are sharded, and after."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = IDS.chunk(dist.get_world_size())[rank]
    told: dict[str, Any] = {}

    def run(name: str, model: Any) -> None:
        hf_lora.save(model, folder / name / "begin")
        losses = []
        for loss in train(model, mine):
            total = torch.tensor(loss)
            dist.all_reduce(total)
            losses.append(float(total) / dist.get_world_size())
            if len(losses) == 1:
                found = gradients(model)
                if rank == 0:
                    save_file(found, folder / name / "gradients.safetensors")
        hf_lora.save(model, folder / name / "end")
        told[name] = {
            "losses": losses,
            "sharded": type(model.model.layers[0].self_attn.q_proj.lora_A).__name__,
            "sum": sum(float(t.double().sum()) for t in gathered(model).values()),
            "written": sorted(training.files(folder / name / "end")),
            "base kept": base_kept(model),
        }

    run("before", shard(wrap(training.llama())))
    # every process draws other numbers, and the first's count
    run("after", wrap(shard(training.llama()), seed=1 + rank))
    run("head before", shard(wrap(training.llama(), **WITH_HEAD)))
    run("head after", wrap(shard(training.llama()), **WITH_HEAD))
    coarse = shard(wrap(training.llama().to(torch.bfloat16)))
    run("bfloat16", coarse)
    accumulated = wrap(shard(training.llama()), seed=1 + rank)
    for rows in mine.chunk(2):
        (accumulated(input_ids=rows, labels=rows).loss / 2).backward()
    firsts = {"accumulated": gradients(accumulated)}
    for reentrant in (True, False):
        model = wrap(shard(training.llama()))
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        next(train(model, mine))
        firsts[f"checkpointed, {reentrant=}"] = gradients(model)
    for name, found in firsts.items():
        if rank == 0:
            save_file(found, folder / f"{name}.safetensors")
    return told


def states(folder: Path) -> dict[str, Any]:
    """Save, load and restore in every way that there is for a sharded model."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    told: dict[str, Any] = {}
    trained = shard(wrap(training.llama(), targets=[*LORA["targets"], "lm_head"]))
    for _ in train(trained, IDS):
        pass
    expected = logits(trained)
    # the forward has left whole weights in the last group, as an evaluation does
    hf_lora.save(trained, folder / "own")

    ours = folder / "own" if rank == 0 else folder / "not on this machine"
    loaded = hf_lora.load(shard(training.llama()), ours)
    told["one has the file"] = torch.allclose(logits(loaded), expected, atol=1e-6)
    told["nobody has it"] = refusal(
        lambda: hf_lora.load(shard(training.llama()), folder / "nowhere")
    ).split(":")[0]
    told["other base"] = refusal(lambda: hf_lora.load(shard(training.llama(3)), folder / "own"))

    fresh = shard(wrap(training.llama(), seed=9, targets=[*LORA["targets"], "lm_head"]))
    logits(fresh)
    restore_checkpoint(fresh, folder / "own")
    told["restored"] = torch.equal(logits(fresh), expected)

    full = get_model_state_dict(
        trained, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    )
    trained.save_pretrained(folder / "full", state_dict=full, is_main_process=rank == 0)
    trained.save_pretrained(folder / "by all", is_main_process=rank == 0)
    told["full"] = sorted(full)
    again = shard(wrap(training.llama(), seed=9, targets=[*LORA["targets"], "lm_head"]))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(again, full if rank == 0 else {}, options=options)
    told["broadcast"] = torch.equal(logits(again), expected)

    parts = get_model_state_dict(trained, options=StateDictOptions(ignore_frozen_params=True))
    dcp.save(parts, checkpoint_id=folder / "parts")
    told["refused"] = {
        "unwrap": refusal(lambda: hf_lora.unwrap(trained)),
        "merge": refusal(lambda: hf_lora.merge(trained)),
        "view": refusal(lambda: hf_lora.base_view(trained)),
        "write": refusal(lambda: hf_lora.save(trained, folder / "own" / "adapter_config.json")),
        "a part": refusal(
            lambda: trained.save_pretrained(
                folder / "part", state_dict={k: v.to_local() for k, v in parts.items()}
            )
        ),
    }
    told["still"] = torch.equal(logits(trained), expected)
    hf_lora.add_adapter(trained, "late", targets="k_proj", r=2)
    with hf_lora.use_adapter(trained, ["default", "late"]):
        told["with another"] = torch.equal(logits(trained), expected)  # its B is zero
    hf_lora.delete_adapter(trained, "late")
    told["without it"] = torch.equal(logits(trained), expected)
    late = wrap(shard(training.llama()))
    told["unwrapped after"] = sorted(
        {type(m).__name__ for m in hf_lora.unwrap(late).modules()} & {"LoRALinear", "Linear"}
    )
    return told


def meshes(folder: Path) -> dict[str, Any]:
    """One backward over three processes, which do not divide rank 4, or two replicas of two."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = (2, 2) if world == 4 else None
    rows = IDS.repeat(3, 1).chunk(world)[rank]
    told: dict[str, Any] = {}
    for name, model in {
        "before": shard(wrap(training.llama()), sizes),
        "after": wrap(shard(training.llama(), sizes), seed=1 + rank),
    }.items():
        hf_lora.save(model, folder / name)
        model(input_ids=rows, labels=rows).loss.backward()
        found = gradients(model)
        if rank == 0:
            save_file(found, folder / name / "gradients.safetensors")
        loaded = hf_lora.load(shard(training.llama(), sizes), folder / name)
        told[name] = training.same(gathered(loaded), gathered(model))
    return told


def one(folder: Path, name: str) -> tuple[Any, list[float], dict[str, torch.Tensor]]:
    """The same training by one process: the model, its losses, its first gradients."""
    fields = WITH_HEAD if "head" in name else LORA
    base = training.llama()
    model = wrap(base.to(torch.bfloat16) if name == "bfloat16" else base, **fields)
    hf_lora.save(model, folder / "begin")
    losses, first = [], {}
    for loss in train(model, IDS):
        losses.append(loss)
        first = first or gradients(model)
    hf_lora.save(model, folder / "end")
    return model, losses, copy.deepcopy(first)
