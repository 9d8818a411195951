"""``training.json``: what was trained into an output folder, for --resume and for the card."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lora.adapter_io.collective import is_main_process
from hf_lora.errors import ConfigError
from hf_lora.files.atomic import as_json, staged
from hf_lora.files.read import is_adapter_folder
from hf_lora.hub.card.facts import Training
from hf_lora.recipes.recipe import Recipe

if TYPE_CHECKING:
    from hf_lora.recipes.dataset import Counts

RECORD_FILE = "training.json"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training, at one learning rate."""

    learning_rate: float
    steps: int
    train_loss: float
    eval_loss: float | None
    """None without data to evaluate on, or if it is not a finite number: the training diverged."""

    seconds: float
    diverged: bool = False
    """Whether it was stopped because its numbers were no longer finite: nothing of it is kept."""

    eval_accuracy: float | None = None
    """Of a classifier the share of rows that are right; of preferences, of pairs."""

    def beats(self, other: "Run | None") -> bool:
        """Say whether this one is to be kept rather than the other."""
        return other is None or _rank(self) < _rank(other)


@dataclasses.dataclass(frozen=True)
class Extension:
    """Epochs that a training goes on for after it was finished."""

    start: int
    """The step at which it was, the last time."""

    epochs: float
    """All that were added, those of earlier times included."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What came of a recipe."""

    adapter: Path
    """The adapter folder. Beside the adapter it holds ``checkpoints/`` and ``training.json``."""

    best: Run
    """The run whose adapter it is: that with the least loss on what was held out."""

    runs: tuple[Run, ...]
    """All runs, one for each learning rate, in the order of the recipe."""

    train_examples: int
    eval_examples: int
    rows: "Counts"
    """How many rows were read, cut and left out."""

    pushed: str | None
    """The address of what was pushed to the Hub, if the recipe says so."""

    def __str__(self) -> str:
        """Say where the adapter is, and how good."""
        loss = "" if self.best.eval_loss is None else f", eval loss {self.best.eval_loss:.4f}"
        return f"{self.adapter}: {self.best.steps} steps{loss}"


class Record:
    """The file in the output folder that says what was trained, and with which recipe.

    Raises:
        ConfigError: The folder holds a training, and it is not to be resumed, or is another one.
    """

    def __init__(self, recipe: Recipe, *, resume: bool, more: float | None = None):
        self._path = recipe.output / RECORD_FILE
        self._digest = recipe.digest
        self._card: Training | None = None
        self._added = 0.0
        self.runs: list[Run] = []
        self.extension: Extension | None = None
        """What is still to be added to a finished training."""

        if not _begun(recipe.output):
            if more is not None:
                raise ConfigError(f"--more: nothing is trained in {recipe.output} yet")
            return
        if not resume and more is None:
            raise ConfigError(
                f"output: {recipe.output} holds an adapter or a training already; take another "
                "folder, or go on with --resume; or train more epochs with --more"
            )
        content = _read(self._path)
        if content["recipe"] != self._digest:
            raise ConfigError(
                f"output: {recipe.output} was begun with another recipe, so it cannot be resumed "
                "with this one; take another folder"
            )
        self.runs, self._card = content["runs"], content["card"]
        self._added, self.extension = content["added"], content["extension"]
        if more is not None:
            self._extend(recipe, more)

    def _extend(self, recipe: Recipe, more: float) -> None:
        if self.extension is not None:
            raise ConfigError("--more: epochs that were added are not done yet; --resume does them")
        best = None
        for done in self.runs:
            best = done if done.beats(best) else best
        if best is None or best.diverged or self._card is None:
            raise ConfigError("--more: the training is not finished yet; --resume goes on with it")
        if not any((recipe.output / CHECKPOINTS).rglob(f"checkpoint-{best.steps}")):
            raise ConfigError(
                f"--more: the last step has no checkpoint in {recipe.output / CHECKPOINTS}, so the "
                f"optimizer is lost; train another recipe with continue_from: {recipe.output}"
            )
        self.extension = Extension(start=best.steps, epochs=self._added + more)

    def add(self, done: Run) -> None:
        """Write down a run that is done, instead of what it goes on from."""
        same = [run.learning_rate == done.learning_rate for run in self.runs]
        if any(same):
            self.runs[same.index(True)] = done
        else:
            self.runs.append(done)
        if self.extension is not None:
            self._added, self.extension = self.extension.epochs, None
        self.write()

    def finish(self, training: Training) -> None:
        """Write down what a model card tells of the training."""
        self._card = training
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if not is_main_process():
            return
        runs = [dataclasses.asdict(each) for each in self.runs]
        card = self._card and dataclasses.asdict(self._card)
        extension = self.extension and dataclasses.asdict(self.extension)
        text = as_json(
            {
                "recipe": self._digest,
                "tries": runs,
                "card": card,
                "added": self._added,
                "extension": extension,
            }
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with staged(self._path, lambda file: file.write(text)) as new:
            os.replace(new, self._path)


def known_training(folder: Path) -> Training | None:
    """Return what is known of the training that made an adapter folder, or None if nothing is.

    Raises:
        ConfigError: There is a record, and it cannot be read.
    """
    if not (folder / RECORD_FILE).is_file():
        return None
    return _read(folder / RECORD_FILE)["card"]


def _begun(output: Path) -> bool:
    """Say whether there is something to lose: a training that failed at once leaves nothing."""
    checkpoints = any((output / CHECKPOINTS).rglob("checkpoint-*"))
    finished = (output / RECORD_FILE).is_file() and bool(_read(output / RECORD_FILE)["runs"])
    return checkpoints or finished or is_adapter_folder(output)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        runs = [Run(**each) for each in content["tries"]]
        card = Training(**content["card"]) if content["card"] else None
        going = content.get("extension")
        return {
            "recipe": content["recipe"],
            "runs": runs,
            "card": card,
            "added": content.get("added", 0.0),
            "extension": Extension(**going) if going else None,
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} cannot be read: {error!r}") from error


def _rank(done: Run) -> tuple[bool, float]:
    return done.diverged, math.inf if done.eval_loss is None else done.eval_loss
