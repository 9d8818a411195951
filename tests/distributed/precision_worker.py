"""Run by test_precision.py: checkpointed activations, 16-bit compute and weights that come late."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaForCausalLM, Trainer, TrainerCallback
from transformers.distributed import DistributedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import hf_lora
from hf_lora.compat.dtensor import full_tensor
from hf_lora.model.registry import wrapped
from tests.distributed.fsdp_worker import IDS, refusal, shard, wrap
from tests.distributed.trainer_worker import KINDS, ROWS, force_fsdp
from tests.integrations import training

REENTRANT = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}
PLAIN = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
BF16 = {"bf16": True}
WAYS: dict[str, dict[str, Any]] = {
    "reentrant": REENTRANT,
    "not reentrant": PLAIN,
    "bf16": BF16,
    "bf16, reentrant": BF16 | REENTRANT,
    "bf16, not reentrant": BF16 | PLAIN,
}
"""What Trainer is told, in every strategy."""


class ByThePlugin(Trainer):
    """A Trainer on a CPU that takes accelerate's FSDP2 path, as it does by itself on GPUs."""

    options: dict[str, Any] = {}

    def create_accelerator_and_postprocess(self) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        super().create_accelerator_and_postprocess()
        force_fsdp(state_dict_type="FULL_STATE_DICT", **self.options)
        if self.args.bf16:  # as accelerate's state does where FSDP is not forced
            AcceleratorState._shared_state["fsdp_plugin"].set_mixed_precision("bf16")
        self.is_fsdp_enabled = True


class Checkpointing(ByThePlugin):
    """The same, where accelerate checkpoints activations instead of the model."""

    options = {"activation_checkpointing": True}


class FromTheFirst(ByThePlugin):
    """The same, with the first process's weights sent to the others."""

    options = {"cpu_ram_efficient_loading": True}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step, whole."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.found:
            self.found = gradients(kwargs["model"])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """All gradients of the adapters, whole; every process takes part."""
    _, registry = wrapped(model)
    found = {}
    for name, parameter in registry.parameters("default"):
        assert parameter.grad is not None, name
        # the wrapper's own name is in the paths of what was wrapped after it
        found[name.replace("_checkpoint_wrapped_module.", "")] = full_tensor(parameter.grad).clone()
    return found


def train(
    folder: Path,
    kind: str,
    name: str,
    cls: type[Trainer] | None = None,
    model: Any = None,
    **fields: Any,
) -> dict[str, Any]:
    """Take two steps with Trainer; leaves the first gradients and the last checkpoint."""
    if model is None:
        native = {"distributed_config": DistributedConfig(fsdp_size=2)} if kind == "native" else {}
        model = LlamaForCausalLM.from_pretrained(folder / "base", **native)
    wrap(model)
    kept = Gradients()
    trainer = training.trainer(
        model,
        folder / name,
        cls or (ByThePlugin if kind == "plugin" else KINDS.get(kind, Trainer)),
        callbacks=[kept],
        per_device_train_batch_size=ROWS // (1 if kind == "alone" else 2),
        gradient_accumulation_steps=1,
        max_steps=2,
        save_steps=2,
        max_grad_norm=0.0,
        save_only_model=kind == "native",
        **fields,
    )
    trainer.train()
    if os.environ.get("RANK", "0") == "0":
        save_file(kept.found, folder / name / "gradients.safetensors")
    return {
        "around": type(trainer.model_wrapped).__name__,
        "block": type(trainer.model.model.layers[0]).__name__,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "sum": sum(float(g.double().sum()) for g in kept.found.values()),
    }


def by_trainer(folder: Path) -> dict[str, Any]:
    """Every strategy in every way."""
    told = {}
    for kind in ("ddp", "native", "plugin"):
        for way, fields in WAYS.items():
            told[f"{kind}, {way}"] = train(folder, kind, f"{kind}, {way}", **fields)
    for way, fields in {"": {}, "bf16": BF16}.items():
        name = f"plugin checkpoints {way}".strip()
        told[name] = train(folder, "plugin", name, Checkpointing, **fields)
    first = os.environ["RANK"] == "0"
    model = LlamaForCausalLM.from_pretrained(folder / "base") if first else empty()
    told["plugin from the first"] = train(
        folder, "plugin", "plugin from the first", FromTheFirst, model
    )
    return told


def empty() -> Any:
    """A model without weights; the buffers that are in no checkpoint are there."""
    with torch.device("meta"):
        model = training.llama()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    return model


def checkpointed(model: Any) -> Any:
    """Put torch's wrapper around every block."""
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper),
        check_fn=lambda module: isinstance(module, LlamaDecoderLayer),
    )
    return model


def mixed(model: Any) -> Any:
    """Shard with parameters in bfloat16 for compute and gradients reduced in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = torch.distributed.device_mesh.init_device_mesh(
        "cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",)
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def fill_base(model: Any, rank: int) -> Any:
    """Send the first process's base weights to all, beside whatever else the model has."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    state = training.llama().state_dict() if rank == 0 else {}
    set_model_state_dict(model, state, options=options)
    return model


def late(model: Any, rank: int) -> Any:
    """Give a sharded model without weights memory, which is poisoned, and then the base."""
    torch.use_deterministic_algorithms(True)
    try:
        model.to_empty(device="cpu")
        assert full_tensor(model.lm_head.weight.detach()).isnan().all()
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    finally:
        torch.use_deterministic_algorithms(False)
    return fill_base(model, rank)


def one_has_all(rank: int, adapt: Callable[[Any], Any]) -> Any:
    """The first process has an adapted model, the others only its shape; then all have a share."""
    model = adapt(training.llama() if rank == 0 else empty())
    state = model.state_dict() if rank == 0 else {}
    buffers = LlamaRotaryEmbedding(model.config)
    model = shard(model.to("meta"))
    torch.use_deterministic_algorithms(True)
    model.to_empty(device="cpu")
    torch.use_deterministic_algorithms(False)
    drawn = [full_tensor(p.detach()) for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(p).all() for p in drawn)  # before anything is loaded
    model.model.rotary_emb = buffers
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    return model


def steps(model: Any, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Take a step, so that B is no longer zero, and leave the gradients of the next; its loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    return loss


def raw(folder: Path) -> dict[str, Any]:
    """PyTorch's fully_shard, in every way."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = IDS.chunk(dist.get_world_size())[rank]
    told: dict[str, Any] = {}

    def run(name: str, model: Any, bf16: bool = False) -> None:
        (folder / name).mkdir(exist_ok=True)
        hf_lora.save(model, folder / name)
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        model.save_pretrained(folder / name / "full", state_dict=full, is_main_process=rank == 0)
        loss = steps(model, mine, bf16)
        found = gradients(model)
        if rank == 0:
            save_file(found, folder / name / "gradients.safetensors")
        total = loss.detach().float()
        dist.all_reduce(total)
        told[name] = {
            "loss": float(total) / dist.get_world_size(),
            "sum": sum(float(g.double().sum()) for g in found.values()),
        }

    run("wrapped, checkpointed, sharded", shard(checkpointed(wrap(training.llama()))))
    run("checkpointed, wrapped, sharded", shard(wrap(checkpointed(training.llama()))))
    run("sharded, wrapped, checkpointed", checkpointed(wrap(shard(training.llama()))))
    run("bf16 autocast", shard(wrap(training.llama())), bf16=True)
    run("bf16 autocast, checkpointed", shard(checkpointed(wrap(training.llama()))), bf16=True)
    run("bf16 policy", mixed(wrap(training.llama())))
    run("bf16 policy, wrapped after", wrap(mixed(training.llama())))
    run("bf16 policy, checkpointed", mixed(checkpointed(wrap(training.llama()))))
    run("empty, wrapped, sharded", late(shard(wrap(empty())), rank))
    run("empty, sharded, wrapped", late(wrap(shard(empty()), seed=1 + rank), rank))
    run("empty, checkpointed", late(shard(checkpointed(wrap(empty()))), rank))
    run("one has all", one_has_all(rank, wrap))
    saved = folder / "one has all"
    load = partial(hf_lora.load, source=saved, trainable=True)
    run("one has all and loads", one_has_all(rank, load))
    other = training.llama(3) if rank == 0 else empty()
    told["other base"] = refusal(lambda: load(other)).split(":")[0]
    return told


def alone(folder: Path, name: str) -> tuple[float, dict[str, torch.Tensor]]:
    """One process with all rows: the loss and the gradients, in the precision that a name says."""
    base = training.llama()
    if "policy" in name:
        base.to(torch.bfloat16).model.rotary_emb = LlamaRotaryEmbedding(base.config)
    model = wrap(base)
    hf_lora.save(model, folder)
    loss = steps(model, IDS, "autocast" in name)
    return float(loss.detach()), gradients(model)
