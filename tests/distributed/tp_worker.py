"""Run by test_tp.py in each process: models that transformers has split by tensor parallelism."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Trainer
from transformers.distributed import DistributedConfig

import hf_lora
from hf_lora.compat.dtensor import distribute_like, full_tensor
from hf_lora.integrations.trainer.optimizer_state import whole_states
from tests.distributed.fsdp_worker import IDS, gathered, gradients, logits, refusal, train
from tests.integrations import training

LORA: dict[str, Any] = {"targets": "all-linear", "r": 4}
EVERYWHERE: dict[str, Any] = {"targets": [r".*_proj", "lm_head"], "r": 4, "alpha": 8.0}
IN_FULL: dict[str, Any] = {"targets": ["q_proj", "down_proj", "score"], "r": 2, "train": ["norm"]}
SHAPES = {"attention_bias": True, "mlp_bias": True, "intermediate_size": 49}
"""Row-parallel layers with biases, and a width that two processes cannot share equally."""

LABELS = torch.tensor([0, 1, 1, 0])
CLIP = 0.05


@torch.no_grad()
def scramble(model: nn.Module) -> None:
    """Give everything that trains other values, the same on every process."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            value = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(distribute_like(value, parameter))


def base(cls: Any = LlamaForCausalLM) -> Any:
    """The base in one process; its biases say something."""
    model = cls(training.llama(**SHAPES, pad_token_id=0).config)
    scramble(model)
    return model


def write_bases(folder: Path) -> None:
    """Leave what every process loads."""
    base().save_pretrained(folder / "base")
    base(LlamaForSequenceClassification).save_pretrained(folder / "classifier")


def load(folder: Path, cls: Any = LlamaForCausalLM, **config: Any) -> Any:
    """Load a base, split over all processes."""
    name = "base" if cls is LlamaForCausalLM else "classifier"
    config = {"tp_size": dist.get_world_size()} | config
    return cls.from_pretrained(folder / name, distributed_config=DistributedConfig(**config))


def wrap(model: Any, seed: int = 1, **fields: Any) -> Any:
    """Wrap as LORA says, from a seed."""
    with training.seeded(seed):
        return hf_lora.wrap(model, **(LORA | fields))


def backward(model: Any, ids: torch.Tensor = IDS, seed: int = 3, share: int = 1) -> float:
    """One backward in training mode, with masks from a seed."""
    with training.seeded(seed):
        loss = model.train()(input_ids=ids, labels=ids).loss / share
        loss.backward()
    return float(loss.detach())


def first_gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of one backward, whole, and none left on the model."""
    backward(model)
    found = gradients(model)
    model.zero_grad()
    return found


def clipped_step(model: Any, **options: Any) -> tuple[float, Any]:
    """A step of AdamW on clipped gradients: the norm that they had, and the optimizer."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, **options)
    backward(model)
    norm = nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()
    return float(full_tensor(norm)), optimizer


def accumulated(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of two backwards over half of the rows each."""
    for rows in IDS.chunk(2):
        backward(model, rows, share=2)
    return gradients(model)


def checkpointed(model: Any) -> dict[str, torch.Tensor]:
    """The gradients where activations are computed again, with masks."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return first_gradients(model)


def generated(model: Any) -> list[list[int]]:
    """What the model makes of the rows' beginnings."""
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.eval().generate(IDS[:, :4], **options).tolist()


def classify(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a classifier whose head was not split, and a step on them, clipped."""
    scramble(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model.train()(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    found = gradients(model)
    nn.utils.clip_grad_norm_(parameters, CLIP)
    torch.optim.AdamW(parameters, foreach=True).step()
    return float(loss.detach()), found


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Have the first process leave tensors for the test to compare."""
    tensors = {key: full_tensor(value.detach()).contiguous() for key, value in tensors.items()}
    if dist.get_rank() == 0:
        save_file(tensors, folder / f"{name}.safetensors")


def everything(folder: Path) -> dict[str, Any]:
    """What two processes do: one start for all of it, which takes longer than the work."""
    dist.init_process_group("gloo")
    return runs(folder) | verbs(folder)


def runs(folder: Path) -> dict[str, Any]:
    """Train, save and load what two processes share."""
    rank = dist.get_rank()
    told: dict[str, Any] = {}

    # every process draws other numbers, and the first's count
    model = wrap(load(folder), seed=1 + rank)
    hf_lora.save(model, folder / "begin")
    told["losses"] = list(train(model, IDS))
    model.save_pretrained(folder / "end", is_main_process=rank == 0)
    told["kinds"] = sorted({type(p).__name__ for p in model.parameters() if p.requires_grad})
    told["sum"] = sum(float(t.double().sum()) for t in gathered(model).values())
    plan = hf_lora.plan(load(folder), **LORA)
    told["plan"] = [plan.base_parameters, plan.parameters]
    summary = hf_lora.summary(model)
    told["summary"] = [summary.base_parameters, summary.adapters[0].parameters]
    told["norms"] = summary.adapters[0].norms

    ours = folder / "alone" if rank == 0 else folder / "not on this machine"
    loaded = hf_lora.load(load(folder), ours, trainable=True)
    write(folder, "logits", {"logits": logits(loaded)})
    write(folder, "gradients", first_gradients(loaded))
    write(folder, "accumulated", accumulated(loaded))
    loaded.zero_grad()
    write(folder, "checkpointed", checkpointed(loaded))
    loaded.gradient_checkpointing_disable()
    backward(loaded, seed=3 + rank)  # every process drops other elements
    told["apart"] = [float(p.grad.to_local().double().sum()) for p in _whole_factors(loaded)]
    loaded.zero_grad()
    told["norm"], optimizer = clipped_step(loaded, foreach=True)
    with whole_states(optimizer):
        state = optimizer.state_dict()
    if rank == 0:
        torch.save(state, folder / "optimizer.pt")
    hf_lora.save(loaded, folder / "stepped")
    again = hf_lora.load(load(folder), folder / "stepped", trainable=True)
    resumed = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    with whole_states(resumed):
        resumed.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    for each, stepping in ((loaded, optimizer), (again, resumed)):
        each.zero_grad()
        backward(each)
        stepping.step()
    told["resumed"] = training.same(gathered(again), gathered(loaded))

    told["clip, fused"] = clipped_step(again, fused=True)[0]
    head = hf_lora.wrap(load(folder, LlamaForSequenceClassification), **IN_FULL)
    told["classifier"], found = classify(head)
    write(folder, "classifier-gradients", found)
    hf_lora.save(head, folder / "classifier-stepped")
    stepped = head(input_ids=IDS).logits
    told["classifier, merged"] = float(
        (hf_lora.merge(head)(input_ids=IDS).logits - stepped).abs().max()
    )
    return told


def verbs(folder: Path) -> dict[str, Any]:
    """Everything else that one does with a wrapped model, and what is refused."""
    told: dict[str, Any] = {}
    plain = load(folder)
    before = _picture(plain)
    said = logits(plain)
    model = hf_lora.load(plain, folder / "alone")
    adapted = logits(model)
    with hf_lora.no_adapter(model):
        told["no_adapter"] = torch.equal(logits(model), said)
    hf_lora.add_adapter(model, "late", targets=["k_proj", "o_proj"], r=2)
    scramble(model)  # the new one: what was loaded is frozen
    with hf_lora.use_adapter(model, ["default", "late"]):
        write(folder, "both", {"logits": logits(model)})
        told["tokens"] = generated(model)
    hf_lora.save(model, folder / "late", adapter="late")
    hf_lora.delete_adapter(model, "late")
    told["deleted"] = torch.equal(logits(model), adapted)
    weights = _bytes(model)
    for _ in range(2):
        hf_lora.merge(model)
        write(folder, "merged", dict(model.named_parameters()))
        merged = logits(model)
        hf_lora.unmerge(model)
    told["merged"] = float((merged - adapted).abs().max())
    told["unmerged"] = weights == _bytes(model)
    told["view"] = refusal(lambda: hf_lora.base_view(model))
    hf_lora.unwrap(model)
    told["unwrapped"] = [_picture(model) == before, torch.equal(logits(model), said)]
    baked = hf_lora.merge_and_unwrap(hf_lora.load(model, folder / "alone"))
    told["baked"] = torch.equal(logits(baked), merged)
    baked.save_pretrained(folder / "baked")

    styles = {
        "model.layers.*.mlp.gate_proj": "packed_colwise",
        "model.layers.*.self_attn.o_proj": "rowwise_split_input",
        "model.layers.*.self_attn.q_proj": "colwise_rep",
        "model.layers.*.self_attn.v_proj": "replicate",
    }
    other = load(folder, tp_plan=styles)
    before, flags = _picture(other), [p.requires_grad for p in other.parameters()]
    told["refused"] = {
        "styles": _message(lambda: wrap(other)),
        "file": _message(lambda: hf_lora.load(other, folder / "alone")),
        "in full": _message(lambda: wrap(other, targets="q_proj", train=["lm_head"])),
        "embedding": _message(lambda: wrap(other, targets="q_proj", train=["embed_tokens"])),
        "trainer": _trained(folder),
    }
    told["refused"]["native"] = _message(lambda: wrap(_natively_split()))
    staged = load(folder, tp_size=1, pp_size=2)
    told["refused"]["stages"] = _message(lambda: wrap(staged))
    told["as it was"] = _picture(other) == before
    told["as it was"] &= flags == [p.requires_grad for p in other.parameters()]
    return told


def meshes(folder: Path) -> dict[str, Any]:
    """Two parts by tensor parallelism, each sharded over two processes by FSDP2."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = wrap(load(folder, tp_size=2, fsdp_size=2), seed=1 + rank)
    hf_lora.save(model, folder / "begin")
    told: dict[str, Any] = {"losses": []}
    rows = IDS.chunk(2)[rank // 2]
    for loss in train(model, rows):
        total = torch.tensor(loss)
        dist.all_reduce(total)
        told["losses"].append(float(total) / 4)
    hf_lora.save(model, folder / "end")
    told["sum"] = sum(float(t.double().sum()) for t in gathered(model).values())
    # without dropout: the masks of half of the rows are not those of all
    loaded = hf_lora.load(load(folder, tp_size=2, fsdp_size=2), folder / "exact", trainable=True)
    backward(loaded, rows)
    write(folder, "gradients", gradients(loaded))
    told["norm"] = float(
        full_tensor(
            nn.utils.clip_grad_norm_([p for p in loaded.parameters() if p.requires_grad], CLIP)
        )
    )
    told["merge"] = refusal(lambda: hf_lora.merge(loaded))
    told["unwrapped"] = sorted({type(m).__name__ for m in hf_lora.unwrap(loaded).modules()})
    return told


def _natively_split() -> Any:
    model = base()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {"mlp.up_proj": ColwiseParallel()})
    return model


def _whole_factors(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad and not p.placements[0].is_shard()]


def _picture(model: Any) -> list[Any]:
    """What must be there again: modules, their fields, and their tensors."""
    return [
        [(path, type(m).__name__, sorted(vars(m))) for path, m in model.named_modules()],
        [(name, id(p)) for name, p in model.named_parameters()],
    ]


def _bytes(model: Any) -> list[bytes]:
    parts = [p.to_local() if hasattr(p, "device_mesh") else p for p in model.parameters()]
    return [part.detach().numpy().tobytes() for part in parts]


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _trained(folder: Path) -> str:
    model = wrap(load(folder))
    arguments = training.arguments(folder / "trainer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _message(
            lambda: Trainer(model=model, args=arguments, train_dataset=training.tokens())
        )
