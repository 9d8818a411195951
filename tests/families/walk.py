"""One walk for every family of models: from a plan to the base again, each stage held to an oracle.

A family says how its tiny model is built, what it is given, and how it trains a step.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.errors import HfLoRAWarning
from tests.integrations import training

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
R = 2
TOLERANCE = 1e-5
"""What is promised of outputs in float32 that PEFT computes, relative to the largest."""

SEEN = 1e-3
"""What an adapter must change at least for a comparison to say anything."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One tiny model, and what its users do with it."""

    name: str
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    """Keyword arguments of the forward, equal each time."""

    answer: str
    """The name of the output that is compared."""

    rows: Callable[[], list[dict[str, Any]]] | None = None
    """What Trainer is given; without it there is a loop of one's own, on ``loss``."""

    trainer: type | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of that trainer."""

    targets: Any = "all-linear"
    adapts: int = 0
    """How many layers these mean."""

    left_out: tuple[str, ...] = ()
    """Paths that the plan tells are not adapted."""

    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    """More fields of the adapter."""

    warns: str | None = None
    """What wrapping warns of, which also is in the plan."""

    silent: str | None = None
    """What the first step warns of: layers that the outputs do not depend on."""

    peft_runs: bool = True
    """Whether PEFT's own layers run in this model at all."""

    def made(self) -> Any:
        """Return the model, with equal weights each time, in eval mode."""
        with training.seeded(5):
            model = self.build()
            for parameter in model.parameters():  # biases and norms start at 0 or 1
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        return model.eval()

    def adapter(self) -> dict[str, Any]:
        """Return the fields of its adapter."""
        return {"targets": self.targets, "r": R, "alpha": 4.0, **self.fields}

    def warned(self, told: str) -> contextlib.AbstractContextManager[Any]:
        """Return what a wrapping runs in, which warns of what the plan has told, and of no more."""
        assert self.warns is None or re.search(self.warns, told)
        return warned(self.warns)

    @torch.no_grad()
    def answers(self, model: nn.Module) -> torch.Tensor:
        """Return what a model answers, its random numbers begun anew."""
        model.eval()
        with training.seeded(1):
            found = model(**self.inputs())
        return found[self.answer] if self.answer else found

    def train(self, model: Any, folder: Path) -> Any:
        """Take two steps with the trainer of this family and return it."""
        assert self.trainer is not None
        assert self.rows is not None
        options = {"remove_unused_columns": False, "max_steps": 2, "save_steps": 2, **self.options}
        rows = self.rows()
        with warned(self.silent):
            return training.run(
                folder, model=model, cls=self.trainer, train_dataset=rows, **options
            )


def warned(text: str | None) -> contextlib.AbstractContextManager[Any]:
    """Expect a warning of ours, or none, which would be an error."""
    return contextlib.nullcontext() if text is None else pytest.warns(HfLoRAWarning, match=text)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def walk(family: Family, folder: Path) -> None:
    """Go through everything that a user does with a model of transformers, and check each stage."""
    family.made().save_pretrained(folder / "base")
    cls = type(family.made())
    model = cls.from_pretrained(folder / "base").eval()
    plain, before = family.answers(model), training.snapshot(model)
    frozen = family.answers(family.made().requires_grad_(False))

    plan = hf_lora.plan(model, **family.adapter())
    assert not plan.problems
    assert len(plan.targets) == family.adapts, [target.path for target in plan.targets]
    for path in family.left_out:
        assert path in plan.left_out
        assert path in str(plan)

    with training.seeded(2), family.warned(str(plan)):
        assert hf_lora.wrap(model, **family.adapter()) is model
    assert type(model) is cls
    # PyTorch's attention goes another way where no weight needs a gradient
    assert any(torch.equal(family.answers(model), each) for each in (plain, frozen))

    run = family.train(model, folder / "run")
    assert training.same(training.base_tensors(model), run.base_before)
    assert training.checkpoints(run.folder) == ["checkpoint-2"]
    assert training.files(run.folder / "checkpoint-2") == training.CHECKPOINT
    training.scramble(model)  # two steps say little
    adapted = family.answers(model)
    assert distance(adapted, plain) > SEEN

    model.save_pretrained(folder / "adapter")
    assert training.files(folder / "adapter") == ADAPTER
    again = hf_lora.from_pretrained(folder / "adapter", trainable=True)
    assert type(again) is cls
    assert torch.equal(family.answers(again), adapted)
    # where no tensor needs a gradient, PyTorch's matmul may go another way
    frozen = hf_lora.from_pretrained(folder / "adapter")
    assert distance(family.answers(frozen), adapted) < TOLERANCE

    if family.peft_runs:
        base = cls.from_pretrained(folder / "base")
        theirs = peft.PeftModel.from_pretrained(base, folder / "adapter")
        assert distance(family.answers(theirs), adapted) < TOLERANCE

    hf_lora.merge(model)
    assert distance(family.answers(model), adapted) < 10 * TOLERANCE
    hf_lora.unmerge(model)
    assert torch.equal(family.answers(model), adapted)
    assert hf_lora.unwrap(model) is model
    assert training.snapshot(model).keys() == before.keys()
    assert training.same(training.snapshot(model), before)
    assert torch.equal(family.answers(model), plain)
    merged = hf_lora.merge_and_unwrap(again)
    assert distance(family.answers(merged), adapted) < 10 * TOLERANCE
    merged.save_pretrained(folder / "merged")
    assert (
        distance(family.answers(cls.from_pretrained(folder / "merged")), adapted) < 10 * TOLERANCE
    )
