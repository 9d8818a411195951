"""Run by test_deepspeed.py in each process: models under ZeRO-2 and ZeRO-3, and what they leave."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import hf_lora
from hf_lora.adapter_io.restore import restore_checkpoint
from hf_lora.compat.deepspeed import shape_of
from hf_lora.compat.dtensor import gather_full
from hf_lora.model.registry import wrapped
from tests.distributed.fsdp_worker import refusal
from tests.integrations import training

LORA: dict[str, Any] = {"targets": ["q_proj", "v_proj", "down_proj"], "r": 4}
WITH_HEAD: dict[str, Any] = {**LORA, "train": ["lm_head"]}
IDS = torch.randint(1, training.VOCABULARY, (8, 60), generator=torch.Generator().manual_seed(5))
"""240 rows for each of two processes: enough for the fused path."""

FEW = IDS[:4, :10]
STEPS = 3

CASES: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "zero2, head in full": {"stage": 2, "lora": WITH_HEAD},
    "zero3, wrapped whole": {"stage": 3},
    "zero3, wrapped in parts": {"stage": 3, "under": True},
    "zero3, few rows": {"stage": 3, "under": True, "rows": FEW},
    "zero3, head in full": {"stage": 3, "under": True, "lora": WITH_HEAD},
    "zero3, reentrant": {"stage": 3, "under": True, "reentrant": True},
    "zero3, checkpointed": {"stage": 3, "under": True, "reentrant": False},
    "zero3, nothing kept": {"stage": 3, "under": True, "keep": 0},
    "zero2, bfloat16": {"stage": 2, "more": {"bf16": {"enabled": True}}},
    "zero3, bfloat16": {"stage": 3, "under": True, "more": {"bf16": {"enabled": True}}},
}


def start() -> Any:
    """Import DeepSpeed for a CPU, without the operation that it would compile for a minute."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Where a CPU is asked for, and not just all that there is, accelerate leaves DeepSpeed out; and
    # where gloo is not asked for, each process believes that it is alone.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[index]
    deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed


def config(stage: int, keep: int | None = None, **more: Any) -> dict[str, Any]:
    """A configuration of DeepSpeed; ``keep`` is the size up to which ZeRO-3 keeps a parameter."""
    zero: dict[str, Any] = {"stage": stage}
    if keep is not None:
        zero["stage3_param_persistence_threshold"] = keep
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **more,
    }


@contextlib.contextmanager
def under(settings: dict[str, Any] | None) -> Iterator[None]:
    """Have from_pretrained partition what it loads, if there are settings."""
    kept = settings and HfDeepSpeedConfig(settings)  # transformers itself only has a weak reference
    try:
        yield
    finally:
        del kept
        unset_hf_deepspeed_config()


def load_base(folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """The base model, in parts if there are settings."""
    with under(settings):
        return LlamaForCausalLM.from_pretrained(folder / "base", **options)


def wrap(model: Any, seed: int = 1, **fields: Any) -> Any:
    """Wrap as LORA says, from a seed."""
    with training.seeded(seed):
        return hf_lora.wrap(model, **(LORA | fields))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def engine_of(deepspeed: Any, model: nn.Module, settings: dict[str, Any]) -> Any:
    """DeepSpeed's engine for a model."""
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings)
    return engine


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """All adapter tensors of a model, whole."""
    _, registry = wrapped(model)
    tensors = [(key, t) for (*_, key), (*_, t) in zip(
        registry.keys("default"), registry.tensors("default"), strict=True
    )]  # fmt: skip
    return {key: tensor.detach().clone() for key, tensor in gather_full(dict(tensors)).items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """What the model says to a few rows."""
    model.eval()  # an engine's own returns nothing
    return model(input_ids=FEW).logits


def mean(loss: torch.Tensor) -> float:
    """The mean of a loss over all processes."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def train(engine: Any, ids: torch.Tensor, found: Callable[[], None] | None = None) -> list[float]:
    """Take some steps; ``found`` is called after the first backward."""
    engine.train()
    losses = []
    rows = ids.chunk(dist.get_world_size())[dist.get_rank()]
    for _ in range(STEPS):
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        if found is not None and not losses:
            found()
        engine.step()
        losses.append(mean(loss))
    return losses


def one(folder: Path, name: str) -> tuple[Any, list[float], dict[str, torch.Tensor]]:
    """The same training by one process: the model, its losses, its first gradients."""
    case = CASES[name]
    ids = case.get("rows", IDS)
    model = wrap(load_base(folder), **case.get("lora", LORA))
    hf_lora.save(model, folder / "alone" / name / "begin")
    optimizer = optimizer_of(model)
    losses, first = [], {}
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        first = first or {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    hf_lora.save(model, folder / "alone" / name / "end")
    return model, losses, first


def trainings(folder: Path) -> dict[str, Any]:
    """Train by DeepSpeed's engine alone; leave the first gradients, and what is saved."""
    deepspeed = start()
    rank = dist.get_rank()
    told: dict[str, Any] = {}
    for name, case in CASES.items():
        settings = config(case["stage"], case.get("keep"), **case.get("more", {}))
        base = load_base(folder, settings if case.get("under") else None)
        lora = case.get("lora", LORA)
        # in parts, every process draws other numbers, and the first's count; as DDP's do
        model = wrap(base, seed=1 + rank, **lora)
        begin = folder / name / "begin"
        if case.get("under"):
            hf_lora.save(model, begin)
        if "reentrant" in case:
            model.gradient_checkpointing_enable({"use_reentrant": case["reentrant"]})
            model.enable_input_require_grads()
        engine = engine_of(deepspeed, model, settings)
        if not case.get("under"):
            hf_lora.save(engine, begin if rank == 0 or case["stage"] == 3 else folder / "other")
        layer = model.get_submodule("model.layers.0.self_attn.q_proj")
        shapes = [tuple(layer.weight.shape), shape_of(layer.lora_A)]

        def keep_gradients(name: str = name, model: Any = model) -> None:
            trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
            found = {n: deepspeed.utils.safe_get_full_grad(p) for n, p in trains.items()}
            if rank == 0:
                save_file({n: g.clone() for n, g in found.items()}, folder / f"{name}.safetensors")

        losses = train(engine, case.get("rows", IDS), keep_gradients)
        hf_lora.save(model, folder / name / ("end" if rank == 0 or case["stage"] == 3 else "end2"))
        values = gathered(model)
        norms = hf_lora.summary(model).adapters[0].norms
        told[name] = {
            "losses": losses,
            "shapes": shapes,
            "engine": type(engine.optimizer).__name__,
            "sum": sum(float(t.double().sum()) for t in values.values()),
            "norms": sorted(norms.values()),
        }
        engine.destroy()
    return told


def states(folder: Path) -> dict[str, Any]:
    """Load, save, refuse and merge models in parts."""
    deepspeed = start()
    rank = dist.get_rank()
    settings = config(3, 0)
    told: dict[str, Any] = {}
    trained = folder / "trained"
    loaded = hf_lora.load(
        load_base(folder, settings), trained if rank == 0 else folder / "not here"
    )
    told["frozen"] = not any(p.requires_grad for p in loaded.parameters())
    told["other base"] = refusal(
        lambda: hf_lora.load(load_base(folder, settings), folder / "foreign")
    )
    told["merge"] = refusal(lambda: hf_lora.merge(loaded))
    told["view"] = refusal(lambda: hf_lora.base_view(loaded))
    told["unwrapped"] = sorted({type(m).__name__ for m in hf_lora.unwrap(loaded).modules()})
    model = hf_lora.load(load_base(folder, settings), trained, trainable=True)
    plan = hf_lora.plan(load_base(folder, settings), **LORA)
    told["plan"] = [plan.base_parameters, plan.base_bytes, plan.parameters]
    engine = engine_of(deepspeed, model, settings)
    told["logits"] = [float(x) for x in logits(engine)[0, 0]]
    train(engine, FEW)
    told["refused"] = {
        "wrap the engine": refusal(
            lambda: hf_lora.wrap(engine_of(deepspeed, training.llama(), settings), **LORA)
        ),
        "add": refusal(lambda: hf_lora.add_adapter(model, "late", targets="k_proj", r=2)),
        "restore": refusal(lambda: restore_checkpoint(model, trained)),
        "nothing gathered": refusal(lambda: model.save_pretrained(folder / "none", state_dict={})),
        "own parts": refusal(
            lambda: model.save_pretrained(folder / "none", state_dict=model.state_dict())
        ),
        "merge": refusal(lambda: hf_lora.merge(model)),
        "unwrap": refusal(lambda: hf_lora.unwrap(model)),
        "write": refusal(lambda: hf_lora.save(model, trained / "adapter_config.json")),
    }
    hf_lora.save(model, folder / "by all")
    gathers: list[int] = []
    count_gathers(deepspeed, gathers)
    hf_lora.save(model, folder / "counted")
    told["gathered"] = list(gathers)
    told["trainable"] = sum(t.numel() for t in gathered(model).values())
    # the way that accelerate's documentation has: the main process is handed what was gathered
    whole = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    model.save_pretrained(folder / "handed", state_dict=whole, is_main_process=rank == 0)
    dist.barrier()
    return told


def count_gathers(deepspeed: Any, counted: list[int]) -> None:
    """Note how many numbers each later GatheredParameters puts together."""
    original = deepspeed.zero.GatheredParameters.__init__

    def init(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        counted.append(sum(p.ds_numel for p in params))
        original(self, params, *args, **kwargs)

    deepspeed.zero.GatheredParameters.__init__ = init


def by_engine(folder: Path) -> dict[str, Any]:
    """All that needs no more than DeepSpeed's engine."""
    return {"trainings": trainings(folder), "states": states(folder)}
