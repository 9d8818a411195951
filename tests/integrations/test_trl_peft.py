"""TRL's trainers: the losses of PEFT's arm, and one set of weights in memory."""

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import hf_lora
from tests.integrations import training
from tests.integrations.trl_runs import (
    COMPLETIONS,
    PREFERENCES,
    PROMPTS,
    SENTENCES,
    make,
    reward,
    small,
)

STEPS = 3
SAMPLING = {"beta": 0.1, "max_completion_length": 6, "num_generations": 2}
PAIRS = {"chosen": PREFERENCES["chosen"], "rejected": PREFERENCES["rejected"]}


@dataclasses.dataclass
class Kind:
    """One trainer, and what it is made with."""

    cls: Any
    config: Any
    data: dict[str, Any]
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    head: bool = False
    compared: tuple[str, ...] = ()
    """What it logs beside the loss that hangs on the reference."""


KINDS = {
    "sft": Kind(SFTTrainer, SFTConfig, SENTENCES),
    "dpo": Kind(DPOTrainer, DPOConfig, PREFERENCES, compared=("rewards/chosen",)),
    "kto": Kind(KTOTrainer, KTOConfig, COMPLETIONS, compared=("kl",)),
    "reward": Kind(RewardTrainer, RewardConfig, PAIRS, head=True),
    "grpo": Kind(
        GRPOTrainer, GRPOConfig, PROMPTS, SAMPLING, {"reward_funcs": reward}, compared=("kl",)
    ),
    "rloo": Kind(
        RLOOTrainer, RLOOConfig, PROMPTS, SAMPLING, {"reward_funcs": reward}, compared=("kl",)
    ),
}


class Memory(TrainerCallback):
    """Counts, at every step, the tensors that are as large as the embeddings."""

    def __init__(self, shape: torch.Size):
        self.shape = shape
        self.seen: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        alive = [t for t in gc.get_objects() if isinstance(t, torch.nn.Parameter)]
        self.seen.append(len({t.data_ptr() for t in alive if t.shape == self.shape}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, and for each an adapter that has been trained."""
    training.speed_up_collection()  # and leave what other tests made out of what is counted
    path = tmp_path_factory.mktemp("bases")
    config = small().config
    config.num_labels = 1
    with training.seeded(0):
        with_head = LlamaForSequenceClassification(config)
    for name, base, fields in (("lm", small(), {}), ("head", with_head, {"train": ["score"]})):
        base.save_pretrained(path / name)
        loaded = type(base).from_pretrained(path / name)
        with training.seeded(1):
            hf_lora.wrap(loaded, ["q_proj", "v_proj"], r=4, **fields)
            with torch.no_grad():
                for parameter in loaded.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        hf_lora.save(loaded, path / f"{name}-adapter")
    return path


def run(kind: Kind, folder: Path, output: Path, attach: Callable[[Any, Path], Any]) -> Any:
    """Train one arm; return what it logged and how much it kept in memory."""
    name = "head" if kind.head else "lm"
    auto = AutoModelForSequenceClassification if kind.head else AutoModelForCausalLM
    base = auto.from_pretrained(folder / name)
    shape = base.get_input_embeddings().weight.shape
    model = attach(base, folder / f"{name}-adapter")
    memory = Memory(shape)
    args = {"bf16": False, "max_steps": STEPS, "save_strategy": "no", **kind.args}
    gc.collect()
    trainer = make(
        kind.cls, kind.config, model, output, kind.data, args=args, callbacks=[memory], **kind.given
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [[log[key] for key in ("loss", *kind.compared)] for log in logs], memory.seen


@pytest.mark.parametrize("name", KINDS)
def test_the_losses_of_pefts_arm_and_one_set_of_weights(name: str, folder: Path, tmp_path: Path):
    kind = KINDS[name]
    ours, kept = run(
        kind, folder, tmp_path / "ours", lambda m, path: hf_lora.load(m, path, trainable=True)
    )
    # the embeddings and the head; a reward model's head has another shape
    assert kept == [1 if kind.head else 2] * STEPS
    theirs, _ = run(
        kind,
        folder,
        tmp_path / "theirs",
        lambda m, path: PeftModel.from_pretrained(m, str(path), is_trainable=True),
    )
    assert len(ours) == STEPS
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6, atol=1e-6)
