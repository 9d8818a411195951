"""What a recipe can train: language models, classifiers, rewards, preferences; one table of them.

Rewards and preferences are trained by TRL's trainers, on TRL's own data path.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_lora.adapter_io.tasks import class_in
from hf_lora.errors import ConfigError
from hf_lora.recipes.base_model import check_writes_text
from hf_lora.recipes.data import Data
from hf_lora.recipes.dataset import Example, Examples, Shape, collate, language_rows
from hf_lora.recipes.forms import FORMS, LANGUAGE, MAY_HAVE, Form, RowFault

LANGUAGE_MODELING = "language-modeling"
_CLASSIFIER = "AutoModelForSequenceClassification"


@dataclasses.dataclass(frozen=True)
class Task:
    """Something that a recipe can train."""

    forms: tuple[Form, ...]
    """The forms of data that it takes."""

    shapes: Callable[[Any, Data, int], Shape]
    """What makes examples out of rows."""

    loader: str
    """The auto class of the base."""

    rate: float
    """The learning rate if a recipe says none; Trainer's own are meant for every weight."""

    trl: tuple[str, str] | None = None
    """TRL's trainer and its arguments, if it is one of TRL's."""

    @property
    def arguments(self) -> type[TrainingArguments]:
        """The class of the arguments in a recipe's ``trainer`` section.

        Raises:
            ConfigError: It is TRL's, and TRL is not installed.
        """
        return TrainingArguments if self.trl is None else getattr(_trl(), self.trl[1])

    def check(self, config: Any) -> None:
        """Raise unless a base can be trained for it.

        Raises:
            ConfigError: It was saved as something else, or transformers has no such class for it.
        """
        if self.loader == "AutoModelForCausalLM":
            check_writes_text(config)
        elif class_in(self.loader, config) is None:
            raise ConfigError(
                f"{config.name_or_path!r} is a {type(config).__name__}, for which transformers has "
                "no classifier of sequences."
            )

    def load_options(self, examples: Examples, tokenizer: Any) -> dict[str, Any]:
        """Return what the base is loaded with, beside where it is."""
        if self.loader != _CLASSIFIER:
            return {}
        names = [str(label) for label in examples.labels] or ["reward"]
        options: dict[str, Any] = {"id2label": dict(enumerate(names))}
        options["label2id"] = {name: number for number, name in enumerate(names)}
        return {**options, "pad_token_id": _padding(tokenizer)}

    def trainer(
        self, model: Any, args: TrainingArguments, examples: Examples, tokenizer: Any
    ) -> Trainer:
        """Return the trainer of a wrapped model."""
        if self.trl is not None:
            return getattr(_trl(), self.trl[0])(
                model=model,
                args=args,
                train_dataset=_dataset(examples.train),
                eval_dataset=examples.eval and _dataset(examples.eval),
                processing_class=tokenizer,
            )
        labelled = self.loader == _CLASSIFIER
        pad = _padding(tokenizer)
        return Trainer(
            model=model,
            args=args,
            train_dataset=examples.train,  # type: ignore[arg-type]
            eval_dataset=examples.eval,  # type: ignore[arg-type]
            data_collator=(lambda rows: collate_labelled(rows, pad)) if labelled else collate,
            compute_metrics=accuracy if labelled else None,
        )


def label_rows(tokenizer: Any, data: Data, length: int) -> Shape:
    """Return what makes examples for a classifier out of rows."""
    text, label = (data.columns.get(name, name) for name in FORMS["label"])

    def shape(row: Mapping[str, Any]) -> tuple[Example | None, bool]:
        missing = [name for name in (text, label) if row.get(name) is None]
        if missing:
            raise RowFault(f"no column {', '.join(missing)}; it has {', '.join(row) or 'none'}")
        if not isinstance(row[text], str):
            raise RowFault(f"the {text} is {type(row[text]).__name__}, not text")
        if not isinstance(row[label], (str, int)):
            raise RowFault(f"the {label} is {type(row[label]).__name__}, neither text nor a number")
        ids = tokenizer(row[text])["input_ids"]
        if not ids:
            return None, False
        cut = len(ids) > length
        return {"input_ids": np.array(ids[:length], np.int32), "label": row[label]}, cut

    return shape


def preference_rows(tokenizer: Any, data: Data, length: int) -> Shape:
    """Return what takes TRL's columns out of rows, as they are; TRL encodes and cuts them."""
    names = (*FORMS["preference"], *MAY_HAVE["preference"])
    columns = {name: data.columns.get(name, name) for name in names}

    def shape(row: Mapping[str, Any]) -> tuple[Example | None, bool]:
        found = {name: row[c] for name, c in columns.items() if row.get(c) is not None}
        missing = [columns[name] for name in FORMS["preference"] if name not in found]
        if missing:
            raise RowFault(f"no column {', '.join(missing)}; it has {', '.join(row) or 'none'}")
        for name in FORMS["preference"]:
            if not isinstance(found[name], (str, list)):
                raise RowFault(f"{name} is {type(found[name]).__name__}, neither text nor messages")
        return found, False

    return shape


def labelled(examples: Examples) -> Examples:
    """Return examples whose labels are numbers; the names are in ``labels``.

    Raises:
        ConfigError: All rows have the same label, or one to evaluate on has another than all those
            to train on.
    """
    names = {example["label"] for example in examples.train}
    order = sorted(names, key=lambda name: (isinstance(name, str), name))
    strange = {example["label"] for example in examples.eval or ()} - names
    if strange:
        raise ConfigError(f"data.eval: no row to train on has the label {min(map(str, strange))}")
    if len(order) < 2:
        raise ConfigError(f"data.train: every row has the label {order[0]}; there is no choice")
    number = {name: index for index, name in enumerate(order)}

    def numbered(rows: list[Example]) -> list[Example]:
        return [{**row, "label": number[row["label"]]} for row in rows]

    return dataclasses.replace(
        examples,
        train=numbered(examples.train),
        eval=None if examples.eval is None else numbered(examples.eval),
        labels=tuple(order),
    )


def collate_labelled(examples: Sequence[Example], padding: int) -> dict[str, torch.Tensor]:
    """Return a batch for a classifier: padded on the right with the padding's own token.

    By it a decoder finds the last token of each row.
    """
    batch = collate([{**row, "labels": row["input_ids"]} for row in examples])
    batch["input_ids"][batch["attention_mask"] == 0] = padding
    return {**batch, "labels": torch.tensor([row["label"] for row in examples])}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of rows whose likeliest label is the right one."""
    logits: Any = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((np.argmax(logits, -1) == prediction.label_ids).mean())}


def _padding(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def _dataset(rows: list[Example]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def _trl() -> Any:
    try:
        import trl
    except ImportError as error:
        raise ConfigError(
            "rewards and preferences are trained by TRL, which is not installed: pip install trl"
        ) from error
    return trl


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        LANGUAGE_MODELING: Task(LANGUAGE, language_rows, "AutoModelForCausalLM", 2e-4),
        "classification": Task(("label",), label_rows, _CLASSIFIER, 2e-4),
        "reward": Task(
            ("preference",), preference_rows, _CLASSIFIER, 1e-4, ("RewardTrainer", "RewardConfig")
        ),
        "dpo": Task(
            ("preference",),
            preference_rows,
            "AutoModelForCausalLM",
            2e-5,
            ("DPOTrainer", "DPOConfig"),
        ),
    }
)
"""Name in a recipe to what it trains."""
