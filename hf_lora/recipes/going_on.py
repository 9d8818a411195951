"""A training that stops early and goes on, or goes on after its end: Ctrl-C, and more epochs."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from rich.progress import Progress
from transformers import Trainer, TrainerCallback, get_scheduler
from transformers.trainer_utils import SchedulerType

from hf_lora.errors import ConfigError
from hf_lora.recipes.progress import say


class TrainingStopped(KeyboardInterrupt):
    """Ctrl-C was pressed: training stopped after a step, and that step's checkpoint is saved."""

    def __init__(self, step: int, steps: int):
        super().__init__(f"stopped after step {step} of {steps}; its checkpoint is saved")
        self.step = step


class StopsCleanly(TrainerCallback):
    """At the first Ctrl-C, ends training after the step that is being done, and saves it."""

    def __init__(self, bars: Progress):
        self._bars = bars
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear Ctrl-C for as long as it lasts; a second one ends everything at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say(self._bars, "stopping after this step, to save it; Ctrl-C again stops at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the step saved, and no other begun."""
        if args.world_size > 1:  # one that goes on would wait for the others for ever
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True

    def check(self, trainer: Trainer) -> None:
        """Raise if training did not come to its end.

        Raises:
            TrainingStopped: Somebody stopped it.
        """
        if self.asked and trainer.state.global_step < trainer.state.max_steps:
            raise TrainingStopped(trainer.state.global_step, trainer.state.max_steps)


class FreshSchedule(TrainerCallback):
    """Gives the steps after a finished training a schedule of their own, from its beginning.

    The optimizer's moments stay. Without it the rate would be what is left of the old schedule:
    mostly nothing.
    """

    def __init__(self, start: int):
        self._start = start

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Replace what the schedule says of a step, once the checkpoint's is read."""
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            raise ConfigError(
                f"--more: there is no way to begin the schedule {args.lr_scheduler_type} anew; "
                "train again with continue_from"
            )
        added = state.max_steps - self._start
        factor, start = _factor(args, added), self._start
        schedule.lr_lambdas = [lambda step: factor(step - start)] * len(schedule.lr_lambdas)
        # the first step is done with the rate that stands there already
        for group, base in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = base * factor(state.global_step - start)


def _factor(args: Any, steps: int) -> Any:
    """Return what a schedule of so many steps multiplies the rate with, by step."""
    of_its_own = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    made: Any = get_scheduler(
        SchedulerType(args.lr_scheduler_type),
        of_its_own,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return made.lr_lambdas[0]


def extend(trainer: Trainer, epochs: float, start: int) -> None:
    """Let a trainer go on for so many epochs more than its arguments say, since a step."""
    args = trainer.args
    if args.max_steps > 0:
        batches = len(trainer.get_train_dataloader())
        args.max_steps += round(epochs * max(1, batches // args.gradient_accumulation_steps))
    else:
        args.num_train_epochs += epochs
    trainer.add_callback(FreshSchedule(start))
