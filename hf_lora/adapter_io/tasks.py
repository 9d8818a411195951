"""What models do, in one table: PEFT's word, the heads, what loads them, the Hub's word."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import transformers
from torch import nn

from hf_lora.compat.libraries import is_pretrained
from hf_lora.compat.transformers import classes_in
from hf_lora.files.patterns import endings
from hf_lora.layers.probe import host_class


@dataclasses.dataclass(frozen=True)
class Task:
    """Something that models do."""

    endings: tuple[str, ...]
    """How the names of the classes end that do it."""

    loader: str
    """The auto class that loads such models."""

    on_hub: str | None
    """The Hub's word for it."""

    peft: str | None = None
    """PEFT's word, if it has one."""

    heads: frozenset[str] = frozenset()
    """How the modules end that PEFT trains in full for this task without being told."""

    also: tuple[str, ...] = ()
    """Auto classes for models that do it with other inputs than text: PEFT has no word for them,
    and people take the one for text."""


_CLASSIFIER = frozenset({"classifier", "score"})
TASKS = (
    Task(
        ("ForCausalLM", "LMHeadModel"),
        "AutoModelForCausalLM",
        "text-generation",
        peft="CAUSAL_LM",
        also=("AutoModelForImageTextToText",),
    ),
    Task(
        ("ForConditionalGeneration",),
        "AutoModelForSeq2SeqLM",
        None,
        peft="SEQ_2_SEQ_LM",
        also=("AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText"),
    ),
    Task(
        ("ForSequenceClassification",),
        "AutoModelForSequenceClassification",
        "text-classification",
        peft="SEQ_CLS",
        heads=_CLASSIFIER,
        also=(
            "AutoModelForImageClassification",
            "AutoModelForAudioClassification",
            "AutoModelForVideoClassification",
        ),
    ),
    Task(
        ("ForTokenClassification",),
        "AutoModelForTokenClassification",
        "token-classification",
        peft="TOKEN_CLS",
        heads=_CLASSIFIER,
        also=("AutoModelForAudioFrameClassification",),
    ),
    Task(
        ("ForQuestionAnswering",),
        "AutoModelForQuestionAnswering",
        "question-answering",
        peft="QUESTION_ANS",
        heads=frozenset({"qa_outputs"}),
        also=("AutoModelForDocumentQuestionAnswering", "AutoModelForVisualQuestionAnswering"),
    ),
    Task((), "AutoModel", "feature-extraction", peft="FEATURE_EXTRACTION"),
    Task(("ForMaskedLM",), "AutoModelForMaskedLM", "fill-mask"),
    Task(("ForImageClassification",), "AutoModelForImageClassification", "image-classification"),
    Task(("ForSemanticSegmentation",), "AutoModelForSemanticSegmentation", "image-segmentation"),
    Task(("ForObjectDetection",), "AutoModelForObjectDetection", "object-detection"),
    Task(("ForAudioClassification",), "AutoModelForAudioClassification", "audio-classification"),
    Task(("ForCTC",), "AutoModelForCTC", "automatic-speech-recognition"),
    Task((), "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    Task((), "AutoModelForImageTextToText", "image-text-to-text"),
    Task((), "AutoModelForVideoClassification", "video-classification"),
    Task((), "AutoModelForAudioFrameClassification", None),
    Task((), "AutoModelForDocumentQuestionAnswering", "document-question-answering"),
    Task((), "AutoModelForVisualQuestionAnswering", "visual-question-answering"),
)
BY_PEFT: Mapping[str, Task] = {task.peft: task for task in TASKS if task.peft}
"""PEFT's word to the task."""

HEADS = frozenset().union(*(task.heads for task in TASKS))
"""All heads that PEFT names for a task, whether or not a model has them."""


def task_by_name(class_name: str) -> Task | None:
    """Return what a class does, as far as its name tells."""
    return next((task for task in TASKS if class_name.endswith(task.endings or "\0")), None)


def task_of(kind: type[nn.Module], config: Any) -> Task | None:
    """Return what a class of transformers does: the task whose auto class makes it."""
    named = task_by_name(kind.__name__)
    if named is None:
        return None
    loaders = (named.loader, *named.also)
    found = next((loader for loader in loaders if class_in(loader, config) is kind), None)
    return next((task for task in TASKS if task.loader == found), None)


def known_class(model: nn.Module) -> type[nn.Module] | None:
    """Return transformers' class of a model: its own, or the one that it was derived from."""
    if not is_pretrained(model):
        return None
    config = type(getattr(model, "config", None))
    for kind in host_class(model).__mro__:
        # LlamaPreTrainedModel and the like are no models
        made = not kind.__name__.endswith("PreTrainedModel")
        if made and class_by_name(kind.__name__) is kind and _is_for(kind, config):
            return kind
    return None


def class_by_name(name: Any) -> type[nn.Module] | None:
    """Return the model class of transformers that is called so, if there is one.

    The name may be a stranger's: it is looked up, and nothing is imported that it says.
    """
    try:
        found = getattr(transformers, name, None) if isinstance(name, str) else None
    except (ImportError, RuntimeError):  # it needs a package that is not here
        return None
    pretrained = transformers.PreTrainedModel
    return found if isinstance(found, type) and issubclass(found, pretrained) else None


def class_for(name: Any, config: Any) -> type[nn.Module] | None:
    """Return the model class of transformers that is called so, if it is one for ``config``."""
    found = class_by_name(name)
    parts = getattr(config, "sub_configs", None) or {}
    fits = found is not None and any(_is_for(found, k) for k in (type(config), *parts.values()))
    return found if fits else None


def class_in(loader: str, config: Any) -> type[nn.Module] | None:
    """Return what an auto class makes of a configuration, or None if it has nothing for it."""
    found = classes_in(loader, config)
    if not isinstance(found, (list, tuple)):
        return found
    # which of several is what from_pretrained takes
    named = {each.__name__: each for each in found}
    said = getattr(config, "architectures", None) or ()
    return next((named[name] for name in said if name in named), found[0])


def peft_task(model: nn.Module, trained_names: Collection[str]) -> str | None:
    """Return PEFT's word for what a model does, where it has one with which PEFT opens the file.

    Its auto class for the word has to make this very class: neither a speech model nor a
    vision-language model is one for it. Its classes for classifiers expect the head in the file.

    Args:
        model: The model.
        trained_names: Names of the modules trained in full, which are in the file.
    """
    kind = host_class(model)
    task = task_by_name((known_class(model) or kind).__name__)
    if task is None or task.peft is None or not is_pretrained(model):
        return None
    config = model.config
    made = class_in(task.loader, config)
    elsewhere = getattr(config, "auto_map", None) or {}  # code that came with the base
    if task.loader not in elsewhere and (made is None or not issubclass(kind, made)):
        return None
    meant = [path for path, _ in model.named_modules() if endings(path, task.heads)]
    saved = set(trained_names)
    return task.peft if all(endings(path, saved) for path in meant) else None


def auto_mapping(model: nn.Module, origin: Mapping[str, Any]) -> dict[str, str] | None:
    """Return what PEFT calls so: the class of a model and where it is, for what has no task.

    Args:
        model: The model.
        origin: What the file that its adapter came from says. Of a class that is nobody's but the
            user's, PEFT writes this too, and what is true of this model is kept.
    """
    known = known_class(model)
    kind = known or host_class(model)
    named = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return named if known is not None or named == origin.get("auto_mapping") else None


def _is_for(kind: type[nn.Module], config: type) -> bool:
    wanted = getattr(kind, "config_class", None)
    return isinstance(wanted, type) and issubclass(config, wanted)
