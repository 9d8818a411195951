"""Run by test_trainer_fsdp.py: one training in several ways, each resumed by the others."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import LlamaForCausalLM, Trainer, TrainerCallback
from transformers.distributed import DistributedConfig

import hf_lora
from hf_lora.compat.dtensor import full_tensor
from tests.distributed.fsdp_worker import gathered, logits
from tests.integrations import training

LORA: dict[str, Any] = {"targets": ["q_proj", "v_proj", "lm_head"], "r": 4}
STEPS = {"max_steps": 4, "save_steps": 2, "gradient_accumulation_steps": 1, "logging_steps": 1}
ROWS = 4
"""Of all processes together, in a step."""


def force_fsdp(**options: Any) -> None:
    """Have accelerate believe that it runs under FSDP2, which it rules out on CPUs.

    From then on everything is its own code.
    """
    options = {"cpu_ram_efficient_loading": False, **options}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options
    )


class Sharding(Trainer):
    """A Trainer on a CPU that takes accelerate's FSDP2 path, as it does by itself on GPUs."""

    kind = "FULL_STATE_DICT"
    from_the_first = False
    """Whether the first process's weights are sent to the others, through the meta device."""

    def create_accelerator_and_postprocess(self) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        super().create_accelerator_and_postprocess()
        force_fsdp(
            cpu_ram_efficient_loading=self.from_the_first,
            state_dict_type=self.kind,
        )
        self.is_fsdp_enabled = True


class InParts(Sharding):
    """The same with sharded state dicts."""

    kind = "SHARDED_STATE_DICT"


class FromTheFirst(Sharding):
    """The same with CPU RAM efficient loading."""

    from_the_first = True


class Plain(Trainer):
    """A Trainer that begins with a clean state after one of the others."""

    def create_accelerator_and_postprocess(self) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        super().create_accelerator_and_postprocess()


KINDS: dict[str, type[Trainer]] = {
    "ddp": Plain,
    "native": Plain,
    "plugin": Sharding,
    "plugin in parts": InParts,
    "plugin from the first": FromTheFirst,
}
# who goes on with whose checkpoint
RESUMED = [
    ("ddp", "alone"),
    ("native", "alone"),
    ("plugin", "alone"),
    ("ddp", "ddp"),
    ("plugin", "plugin"),
    ("plugin from the first", "plugin from the first"),
    ("plugin in parts", "plugin in parts"),
    ("ddp", "plugin"),
    ("plugin", "ddp"),
    ("native", "plugin in parts"),
]


class Optimizer(TrainerCallback):
    """Keeps the optimizer's state, whole, as a run begins with it."""

    def __init__(self) -> None:
        self.state: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        entries = kwargs["optimizer"].state_dict()["state"].items()
        self.state = {
            i: {k: full_tensor(v).clone() for k, v in each.items()} for i, each in entries
        }


def run(
    folder: Path,
    kind: str,
    name: str,
    resume: Path | None = None,
    lora: Mapping[str, Any] = LORA,
    **fields: Any,
) -> Any:
    """Train in one way; returns the trainer and the optimizer's state at the start."""
    native = {"distributed_config": DistributedConfig(fsdp_size=2)} if kind == "native" else {}
    model = LlamaForCausalLM.from_pretrained(folder / "base", **native)
    # without this Trainer refuses models that from_pretrained has sharded
    fields["save_only_model"] = kind == "native"
    # what others than the first draw does not matter, but where each shards what it has
    other = kind not in ("alone", "plugin", "plugin in parts") and int(os.environ["RANK"]) > 0
    with training.seeded(9 if resume or other else 1):
        hf_lora.wrap(model, **lora)
    optimizer = Optimizer()
    world = 1 if kind == "alone" else 2
    trainer = training.trainer(
        model,
        folder / name,
        KINDS.get(kind, Trainer),
        callbacks=[optimizer],
        per_device_train_batch_size=ROWS // world,
        **(STEPS | fields),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, optimizer.state


def agree(found: dict[int, dict[str, torch.Tensor]], checkpoint: Path) -> bool:
    """Whether an optimizer's state is the one in a checkpoint, number by number."""
    there = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return found.keys() == there.keys() and all(
        torch.equal(found[index][key], there[index][key]) for index in there for key in there[index]
    )


def asked(folder: Path) -> dict[str, Any]:
    """What becomes of a Trainer that is asked for FSDP on a CPU, with no force."""
    trainer, _ = run(folder, "asked", "asked", fsdp=True)
    files = training.files(folder / "asked" / "checkpoint-2")
    return {"around": type(trainer.model_wrapped).__name__, "files": sorted(files)}


def all_ways(folder: Path) -> dict[str, Any]:
    """Train in every way, and go on from each other's checkpoints."""
    told: dict[str, Any] = {}
    for kind in KINDS:
        trainer, _ = run(folder, kind, kind)
        layer = trainer.model.get_submodule("model.layers.0.self_attn.q_proj")
        told[kind] = {
            "around": type(trainer.model_wrapped).__name__,
            "factors": type(layer.lora_A).__name__,
            "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
            "sum": sum(float(t.double().sum()) for t in gathered(trainer.model).values()),
            "files": sorted(training.files(folder / kind / "checkpoint-2")),
        }
    for kind, source in RESUMED:
        checkpoint = folder / source / "checkpoint-2"
        trainer, state = run(folder, kind, f"{kind} after {source}", checkpoint)
        told[f"{kind} after {source}"] = agree(state, checkpoint)
    told["asked for FSDP"] = asked(folder)
    loaded = hf_lora.from_pretrained(
        folder / "plugin" / "checkpoint-4", distributed_config=DistributedConfig(fsdp_size=2)
    )
    alone = hf_lora.from_pretrained(folder / "plugin" / "checkpoint-4")
    told["from_pretrained"] = {
        "sharded": type(loaded.lm_head.weight).__name__,
        "off by": float((logits(loaded) - logits(alone)).abs().max()),
    }
    for kind in ("native", "plugin"):
        best, _ = run(
            folder,
            kind,
            f"best {kind}",
            eval_dataset=training.tokens(4, seed=8),
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            greater_is_better=True,  # of the loss, so that it is not the last that is the best
        )
        there = training.saved(best.state.best_model_checkpoint)
        here = gathered(best.model)
        told[f"best {kind}"] = {
            "equal": sorted(float(t.double().sum()) for t in there.values())
            == sorted(float(t.double().sum()) for t in here.values()),
            "checkpoint": Path(best.state.best_model_checkpoint).name,
        }
    return told
