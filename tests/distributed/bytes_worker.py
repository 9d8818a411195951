"""Run by test_bytes.py in each process: the bytes that a training step hands to the network."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import hf_lora
from tests.distributed.fsdp_worker import shard
from tests.integrations import training

LORA: dict[str, Any] = {"targets": "all-linear", "r": 6}
SIZES: dict[str, Any] = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 50,
    "attention_bias": True,
}
"""Four processes divide neither the rank nor the intermediate size; o_proj is split by its rows and
has a bias."""

ROWS, TOKENS = 2, 10
IDS = torch.randint(1, training.VOCABULARY, (ROWS, TOKENS), generator=torch.manual_seed(5))

_REDUCES = {"allreduce_", "all_reduce", "all_reduce_"}


class Count(TorchDispatchMode):
    """Counts what each collective sends, by the collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All that this process sends."""
        return sum(self.sent.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            self.note(func._opname, args)
        return func(*args, **(kwargs or {}))

    def note(self, name: str, args: Any) -> None:
        """Add a collective's bytes."""
        world = dist.get_world_size()
        if name == "_allgather_base_":  # its output, its input
            self.sent[name] += _bytes(args[0]) * (world - 1) // world
        elif name == "all_gather_into_tensor":
            self.sent[name] += _bytes(args[0]) * (world - 1)
        elif name == "_reduce_scatter_base_":  # likewise
            self.sent[name] += _bytes(args[1]) * (world - 1) // world
        elif name in _REDUCES:
            self.sent[name] += _bytes(args[0]) * 2 * (world - 1) // world
        elif name == "broadcast_":
            self.sent[name] += _bytes(args[0])
        elif name == "allgather_":  # of lists: outputs, inputs
            self.sent[name] += _bytes(args[1]) * (world - 1)
        elif name not in ("wait_tensor", "barrier", "_wrap_tensor_autograd"):
            self.sent[f"unknown: {name}"] += 1 << 40


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        local = value.to_local() if isinstance(value, DTensor) else value
        return local.numel() * local.element_size()
    return sum(map(_bytes, value))


def model_of(wrapped: bool, **more: Any) -> Any:
    """A tiny Llama, with an adapter or not."""
    model = training.llama(**(SIZES | more))
    return hf_lora.wrap(model, **LORA) if wrapped else model


def step(model: Any) -> Count:
    """Count one forward and backward; the first one, in which things are set up, does not count."""
    for count in (Count(), Count()):
        model.train()
        model.zero_grad()
        with count:
            model(input_ids=IDS, labels=IDS).loss.backward()
    return count


def held(model: Any) -> list[int]:
    """The most that a process holds after a step: weights, gradients, Adam's moments."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = _bytes([p.grad for p in trained])
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [[state["exp_avg"], state["exp_avg_sq"]] for state in optimizer.state.values()]
    if hasattr(model, "reshard"):
        model.reshard()
    found = torch.tensor([_bytes(list(model.parameters())), gradients, _bytes(moments)])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def ddp(wrapped: bool) -> int:
    """Count by a communication hook: DDP's own collectives are started in C++."""
    model = DistributedDataParallel(model_of(wrapped))
    sent = [0]
    world = dist.get_world_size()

    def hook(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        flat = bucket.buffer()
        sent[0] += flat.nbytes * 2 * (world - 1) // world
        done = dist.all_reduce(flat.div_(world), async_op=True).get_future()
        return done.then(lambda found: found.value()[0])

    model.register_comm_hook(None, hook)
    for _ in range(2):
        sent[0] = 0
        model(input_ids=IDS, labels=IDS).loss.backward()
    return sent[0]


def split(folder: Path) -> tuple[int, int, int, list[int]]:
    """Count tensor parallelism, with few tokens and with many, saving it, and what is held."""
    config = DistributedConfig(tp_size=dist.get_world_size())
    model = LlamaForCausalLM.from_pretrained(folder / "base", distributed_config=config)
    hf_lora.wrap(model, **LORA)
    few = step(model).total
    rows, count = IDS.repeat(2, 1), Count()
    with count:
        model(input_ids=rows, labels=rows).loss.backward()
    with (saved := Count()):
        hf_lora.save(model, folder / "split")
    return few, count.total, saved.sent["all_gather_into_tensor"], held(model)


def zero() -> dict[str, Any]:
    """Count DeepSpeed's step, with whatever its optimizer sends."""
    from tests.distributed import deepspeed_worker as worker

    deepspeed = worker.start()
    told: dict[str, Any] = {}
    for stage in (2, 3):
        settings = worker.config(stage, 0)
        if stage == 3:
            # of a model this small it would keep everything from forward to backward
            kept = ("stage3_max_reuse_distance", "stage3_max_live_parameters")
            settings["zero_optimization"] |= dict.fromkeys(kept, 0)
        for wrapped in (True, False):
            engine = worker.engine_of(deepspeed, model_of(wrapped), settings)
            for count in (Count(), Count()):
                engine.train()
                with count:
                    engine.backward(engine(input_ids=IDS, labels=IDS).loss)
                    engine.step()
            told.setdefault(f"ZeRO-{stage}", []).append(dict(count.sent))
            engine.destroy()
    return told


def measure(folder: Path) -> dict[str, Any]:
    """What one process sends, by the way of sharing."""
    dist.init_process_group("gloo")
    told: dict[str, Any] = {"DDP": [ddp(True), ddp(False)]}
    model = shard(model_of(True))
    told["FSDP2"] = [step(model).total, step(shard(model_of(False))).total]
    with (count := Count()):
        hf_lora.save(model, folder / "saved")
    told["FSDP2 saved"] = dict(count.sent)
    told["FSDP2 held"] = held(model)
    told["tensor parallel"] = split(folder)
    return told
