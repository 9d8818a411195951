"""Run by test_accelerate.py: loops of one's own with accelerate, saved, resumed and exchanged."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn

import hf_lora
from hf_lora.integrations.trainer.optimizer_state import gathered as whole_state
from tests.distributed.fsdp_worker import IDS, gathered
from tests.distributed.trainer_worker import force_fsdp
from tests.integrations import training

LORA: dict[str, Any] = {"targets": ["q_proj", "v_proj", "lm_head"], "r": 4}
KINDS = ("ddp", "fsdp")
STEPS = 2


class Loop:
    """An accelerator, a prepared model with adapters, a plain second model, and their optimizer."""

    def __init__(
        self,
        kind: str,
        seed: int,
        dropout: float = 0.0,
        *,
        register: bool = True,
        second: bool = True,
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=True)
        if kind == "fsdp":
            force_fsdp()
        if register:
            hf_lora.register(self.accelerator)
            hf_lora.register(self.accelerator)  # once is enough, and twice does no harm
        set_seed(seed)
        model = hf_lora.wrap(training.llama(), **LORA, dropout=dropout)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.second = nn.Linear(2, 2)
        if second and kind != "fsdp":  # one model is all that accelerate takes there
            self.second = self.accelerator.prepare(self.second)

    def train(self) -> None:
        """Take two steps on this process's rows."""
        self.model.train()
        rows = IDS.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        for _ in range(STEPS):
            loss = self.model(input_ids=rows, labels=rows).loss
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """All adapter tensors, and everything that the optimizer keeps, whole."""
        model = getattr(self.model, "module", self.model)
        entries = whole_state(self.optimizer.state_dict())["state"]
        kept = [torch.as_tensor(v).clone() for e in entries.values() for v in e.values()]
        return gathered(model), kept


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same to the bit."""
    (adapters, kept), (others, theirs) = a, b
    same = len(kept) == len(theirs) and all(map(torch.equal, kept, theirs))
    return same and training.same(adapters, others)


def exchange(folder: Path) -> dict[str, Any]:
    """Save by each kind of loop; resume it by the same kind, and load it by the other."""
    dist.init_process_group("gloo")
    told: dict[str, Any] = {}
    saved = {}
    for kind in KINDS:
        loop = Loop(kind, seed=1, dropout=0.1)
        loop.train()
        loop.accelerator.save_state(str(folder / kind))
        saved[kind] = loop.state()
        loop.train()
        resumed = Loop(kind, seed=9, dropout=0.1)
        resumed.accelerator.load_state(str(folder / kind))
        exact = equal(resumed.state(), saved[kind])
        resumed.train()
        told[kind] = {
            "files": sorted(training.files(folder / kind)),
            "loaded": exact,
            "goes on": equal(resumed.state(), loop.state()),
            "type": str(resumed.accelerator.distributed_type),
        }
        loop.accelerator.save_model(loop.model, folder / f"model of {kind}")
    for kind, source in (("ddp", "fsdp"), ("fsdp", "ddp"), ("ddp", "alone"), ("fsdp", "alone")):
        loop = Loop(kind, seed=9, second=False)
        loop.accelerator.load_state(str(folder / source))
        if source == "alone":
            torch.save(loop.state(), folder / f"{kind} {dist.get_rank()}.pt")
        else:
            told[f"{kind} from {source}"] = equal(loop.state(), saved[source])
    return told
