"""What the tests of training share: tiny real models, data, arguments, and what a run leaves."""

import contextlib
import dataclasses
import functools
import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import hf_lora
from hf_lora.model.registry import wrapped as with_registry

VOCABULARY = 48
LENGTH = 10
CHECKPOINT = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "checkpoint_manifest.json",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
}
"""Every file of a checkpoint of a model with one adapter: nothing of the base."""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from this seed inside, and go on outside as if nothing had been drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def llama(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    """A tiny Llama; equal seeds give equal weights."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    with seeded(seed):
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **fields}))


def wrapped(seed: int = 1, base_seed: int = 0, fields: dict | None = None, **lora: Any) -> Any:
    """A tiny Llama with adapters; the same base whatever seed the adapter starts from."""
    model = llama(base_seed, **(fields or {}))
    lora = {"targets": ["q_proj", "v_proj", "down_proj"], "r": 4, "dropout": 0.1, **lora}
    with seeded(seed):
        return hf_lora.wrap(model, **lora)


def tokens(count: int = 24, seed: int = 7) -> list[dict[str, list[int]]]:
    """Random sentences with labels; the last three labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "labels": row[:-3] + [-100] * 3} for row in rows]


def arguments(
    folder: Path, kind: type[TrainingArguments] = TrainingArguments, **fields: Any
) -> TrainingArguments:
    """Arguments for a short run on the CPU: 6 optimizer steps an epoch with 24 examples."""
    usual = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_steps": 4,
        "logging_steps": 1,
    }
    return kind(**{**usual, **fields})


@functools.cache
def speed_up_collection() -> None:
    """Leave the million objects of imported libraries out of what Trainer collects every time."""
    gc.collect()
    gc.freeze()


def trainer(model: Any, folder: Path, cls: type[Trainer] = Trainer, **fields: Any) -> Trainer:
    """A trainer on :func:`tokens`; ``callbacks`` and some more of its arguments may be given."""
    own = {"callbacks", "compute_metrics", "model_init", "eval_dataset", "train_dataset"}
    own |= {"data_collator", "processing_class"}
    given = {name: fields.pop(name) for name in own & fields.keys()}
    speed_up_collection()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return cls(
            model=model,
            args=arguments(folder, **fields),
            **{"train_dataset": tokens(), **given},
        )


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything that belongs to adapters, by name."""
    _, registry = with_registry(model)
    return {
        key: tensor.detach().clone()
        for name in registry.adapters
        for (*_, key), (*_, tensor) in zip(registry.keys(name), registry.tensors(name), strict=True)
    }


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of every tensor that is no adapter's, by name."""
    adapters = with_registry(model)[1].all_parameters()
    held = model.state_dict(keep_vars=True).items()
    return {k: v.detach().clone() for k, v in held if id(v) not in adapters}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal in names, types and every bit."""
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


def saved(folder: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, under PEFT's names."""
    return load_file(Path(folder) / "adapter_model.safetensors")


def in_file_names(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's tensors as the model has them now, under the names that files use."""
    _, registry = with_registry(model)
    return {
        f"base_model.model.{path}.{role}"
        + (".weight" if role in ("lora_A", "lora_B") else ""): tensor.detach().clone()
        for path, _, role, tensor in registry.tensors(name)
    }


def checkpoints(folder: Path) -> list[str]:
    """The names of the checkpoints in a folder, in order."""
    return sorted(
        (path.name for path in Path(folder).glob("checkpoint-*")),
        key=lambda name: int(name.rpartition("-")[2]),
    )


def files(folder: Path) -> set[str]:
    """Every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@dataclasses.dataclass
class Gradients(TrainerCallback):
    """Keeps what the first optimizer step of a run finds: gradients by name."""

    kept: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None and state.global_step == 0:
                self.kept[name] = parameter.grad.detach().clone()


@dataclasses.dataclass
class Run:
    """A finished training and what it left."""

    trainer: Trainer
    folder: Path
    base_before: dict[str, torch.Tensor]

    @property
    def model(self) -> Any:
        return self.trainer.model


def run(folder: Path, resume: str | None = None, model: Any = None, **fields: Any) -> Run:
    """Train a tiny wrapped model, or the given one, from the start or from a checkpoint."""
    model = wrapped() if model is None else model
    before = base_tensors(model)
    made = trainer(model, folder, **fields)
    made.train(resume_from_checkpoint=resume)
    return Run(made, folder, before)


WORDS = ["<pad>", "<eos>", "<unk>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "big"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of twelve words, made here: no file and no network."""
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of every tensor of a model, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def scramble(model: nn.Module, seed: int = 3) -> None:
    """Move everything that trains, as a long training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
