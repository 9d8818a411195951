"""What PEFT's names are called here, and what one of its configurations means in ours.

For people: errors that know a name of PEFT's say ours. PEFT is not imported; its ``LoraConfig`` is
read by its fields, as of PEFT 0.21. What its *files* say is read in ``files/peft_format.py``.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeGuard

from hf_lora.errors import ConfigError, listing
from hf_lora.text import show


class PeftConfig(Protocol):
    """A configuration object of PEFT's, such as its ``LoraConfig``."""

    peft_type: Any
    target_modules: Any


FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "target_modules": "targets",
        "target_parameters": "targets",
        "exclude_modules": "exclude",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": "rslora",
        "modules_to_save": "train",
        "trainable_token_indices": "train_rows",
        "init_lora_weights": "init",
        "rank_pattern": "overrides",
        "alpha_pattern": "overrides",
        "layers_to_transform": "targets, as in layers\\.[0-3]\\..*q_proj",
        "layers_pattern": "targets, as in layers\\.[0-3]\\..*q_proj",
        "rank": "r",
        "lora_r": "r",
        "autocast_adapter_dtype": "dtype",
        "adapter_name": "adapter, an argument of wrap and load",
        "fan_in_fan_out": "nothing: it is told from the layer",
        "task_type": "nothing: it is told from the model",
        "inference_mode": "trainable, an argument of load",
        "low_cpu_mem_usage": "nothing: it always is",
    }
)
"""Names that people bring from PEFT, to what they are called here."""

CALLS: Mapping[str, str] = MappingProxyType(
    {
        "LoraConfig": "LoRAConfig, or the fields as arguments of wrap",
        "PeftConfig": "LoRAConfig",
        "LoraModel": "wrap, which returns the model itself",
        "PeftModel": "load(base, source) to open an adapter, wrap(model, ...) to begin one",
        **dict.fromkeys(
            (
                "PeftModelForCausalLM",
                "PeftModelForSeq2SeqLM",
                "PeftModelForSequenceClassification",
                "PeftModelForTokenClassification",
                "PeftModelForQuestionAnswering",
                "PeftModelForFeatureExtraction",
                "get_peft_model",
                "inject_adapter_in_model",
            ),
            "wrap(model, targets, r=..., alpha=...), for every task",
        ),
        **dict.fromkeys(
            (
                "AutoPeftModel",
                "AutoPeftModelForCausalLM",
                "AutoPeftModelForSeq2SeqLM",
                "AutoPeftModelForSequenceClassification",
                "AutoPeftModelForTokenClassification",
                "AutoPeftModelForQuestionAnswering",
                "AutoPeftModelForFeatureExtraction",
            ),
            "from_pretrained(source)",
        ),
        "TaskType": "nothing: the task is told from the model",
        "prepare_model_for_kbit_training": "nothing: wrap does what it is for",
        "get_peft_model_state_dict": "save(model, folder), or model.get_adapter_state_dict()",
        "set_peft_model_state_dict": "load(model, folder, replace=True)",
        "merge_and_unload": "merge_and_unwrap(model)",
        "unload": "unwrap(model)",
        "disable_adapter": "no_adapter(model)",
        "set_adapter": "activate(model, names)",
        "print_trainable_parameters": "print(summary(model))",
        "get_nb_trainable_parameters": "summary(model)",
        "load_adapter": "load(model, source, adapter=name)",
        "add_weighted_adapter": 'combine({"a": 0.7, "b": 0.3}, model=model) makes one of them, '
        'activate(model, {"a": 0.7, "b": 0.3}) weighs adapters in use',
    }
)
"""Classes and functions of PEFT's, to what does the same here."""

_DENSE = "which here acts on the matrices of the factors' shared spaces, with density="

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "linear": "'linear' adds up A and B each for itself, and the product of two sums is not "
        "the sum of the products. 'cat' is the sum itself; 'svd', with rank=, is the nearest of a "
        "rank",
        "ties_svd": f"'ties_svd' is 'ties' here, {_DENSE} and rank=",
        "dare_linear": f"'dare_linear' drops entries of A and B; here 'dare', {_DENSE}",
        "dare_linear_svd": f"'dare_linear_svd' is 'dare' here, {_DENSE} and rank=",
        "dare_ties": "'dare_ties' is two methods in turn; here 'dare' or 'ties', with density=",
        "dare_ties_svd": "'dare_ties_svd' is two methods in turn; here 'dare' or 'ties', with "
        "density= and rank=",
        "magnitude_prune": "'magnitude_prune' is for entries of A and B, which depend on how an "
        "update is factored; 'svd' keeps what is largest of the update itself",
        "magnitude_prune_svd": "'magnitude_prune_svd' is none here; 'svd', with rank=, keeps what "
        "is largest of an update",
    }
)
"""Ways to combine adapters in PEFT's ``add_weighted_adapter``, to what to say of each here."""

# Fields of a LoraConfig that say nothing about what is to be trained, or that are told otherwise.
_OF_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform",
    "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "r", "rank_pattern",
    "target_modules", "target_parameters", "trainable_token_indices", "use_rslora",
}  # fmt: skip
_NO_TARGET = "dummy-target-modules"
_LITERAL = re.compile(r"[\w.-]+")


def is_peft_config(value: object) -> TypeGuard[PeftConfig]:
    """Say whether a value is one of PEFT's configuration objects."""
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and hasattr(value, "peft_type")
        and hasattr(value, "inference_mode")
    )


def hint(name: str) -> str:
    """Return what to say of a name that is unknown here but not in PEFT, as the end of a line."""
    known = FIELDS.get(name) or CALLS.get(name)
    return f" (here: {known})" if known else ""


def translate(config: PeftConfig | Mapping[str, Any], words: Collection[str]) -> dict[str, Any]:
    """Return the fields of our ``LoRAConfig`` that mean what a configuration of PEFT's means.

    Args:
        config: PEFT's ``LoraConfig``, or what its ``adapter_config.json`` holds.
        words: Names that mean something else here than a module of that name.

    Raises:
        ConfigError: It is of another method, uses what is not implemented, or leaves open which
            layers it means; all of it is listed.
    """
    given = dict(config) if isinstance(config, Mapping) else vars(config)
    method = given.get("peft_type", "LORA")
    if method != "LORA":
        method = getattr(method, "value", method)
        raise ConfigError(f"peft_type is {show(method)}; hf_lora does LoRA alone.")
    problems = [
        f"{name} = {show(value)}"
        for name, value in given.items()
        if value and name not in _READ | _OF_NO_EFFECT
    ]
    fields: dict[str, Any] = {
        "r": given.get("r", 8),
        "alpha": given.get("lora_alpha", 8),
        "dropout": given.get("lora_dropout", 0.0),
        "rslora": given.get("use_rslora") or False,
        "bias": given.get("bias") or "none",
        "lora_bias": given.get("lora_bias") or False,
        "targets": list(_targets(given, words, problems)),
        "exclude": list(_names(given.get("exclude_modules"), words)),
        "init": _init(given.get("init_lora_weights", True), problems),
        "overrides": {
            _no_word(name, words): numbers for name, numbers in _overrides(given, problems).items()
        },
    }
    if given.get("modules_to_save"):
        # PEFT takes every module whose name ends so, not only the whole dotted tail
        fields["train"] = [f".*{re.escape(name)}" for name in given["modules_to_save"]]
    if given.get("trainable_token_indices"):
        fields["train_rows"] = _rows(given["trainable_token_indices"], problems)
    if problems:
        raise ConfigError(listing("This configuration of PEFT's cannot be used here", problems))
    return fields


def _rows(said: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(said, Mapping):
        problems.append(
            f"trainable_token_indices = {show(said)}: a list is for the model's input embeddings; "
            "name them, as in {'embed_tokens': [...]}"
        )
        return {}
    return {f".*{re.escape(name)}": rows for name, rows in said.items()}


def _init(said: Any, problems: list[str]) -> str:
    if said is True:
        return "kaiming"
    if said != "gaussian":
        problems.append(
            f"init_lora_weights = {show(said)}; here: init, 'kaiming' (True in PEFT) or 'gaussian'"
        )
    return "gaussian"


def _names(said: Any, words: Collection[str]) -> Iterator[str]:
    """Yield our patterns for what PEFT takes as one expression, or as a list of names."""
    if isinstance(said, str):
        yield f"^(?:{said})"  # for PEFT it must match the whole path
    elif said:
        for name in map(re.escape, sorted(said)):
            yield _no_word(name, words)


def _no_word(pattern: str, words: Collection[str]) -> str:
    return f"(?:{pattern})" if pattern in words else pattern


def _targets(
    given: Mapping[str, Any], words: Collection[str], problems: list[str]
) -> Iterator[str]:
    modules, parameters = given.get("target_modules"), given.get("target_parameters")
    if isinstance(modules, str) and modules.lower() == "all-linear":
        yield "all-linear"
    elif modules == _NO_TARGET:  # nothing but rows
        return
    elif modules and not isinstance(modules, str) and (where := _index(given)):
        for name in map(re.escape, sorted(modules)):
            yield f"^{name}|^(?={where})(?:.*\\.)?{name}"
    elif modules:
        yield from _names(modules, words)
    elif not parameters:
        problems.append(
            "target_modules is not given, and PEFT then has a list of its own for each "
            "architecture; name the layers"
        )
    yield from map(re.escape, sorted(parameters or ()))


def _index(given: Mapping[str, Any]) -> str | None:
    """Return an expression for how paths begin in the blocks that are meant, if only some are.

    PEFT looks at the first number that stands below two names, or below one that fits a pattern.
    """
    blocks = given.get("layers_to_transform")
    if blocks is None or blocks == []:
        return None
    numbers = "|".join(map(str, [blocks] if isinstance(blocks, int) else blocks))
    said = given.get("layers_pattern") or []
    patterns: Iterable[str] = [said] if isinstance(said, str) else said
    ways, none_before = [], ""
    for pattern in patterns:
        first = rf"(?:(?!(?:{pattern})\.\d+\.)[^.]*\.)*(?:{pattern})\."
        ways.append(rf"{none_before}{first}(?:{numbers})\.")
        none_before += rf"(?!{first}\d+\.)"
    return "|".join(ways) or rf"[^.]*\.[^.]*\.(?:(?!\d+\.)[^.]*\.)*(?:{numbers})\."


def _overrides(given: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Return both patterns as one: a layer takes the first that fits it of each."""
    ranks, alphas = (given.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    if list(ranks) == list(alphas):
        return {name: {"r": ranks[name], "alpha": alphas[name]} for name in ranks}
    if not ranks or not alphas:
        field = "r" if ranks else "alpha"
        return {name: {field: value} for name, value in (ranks or alphas).items()}
    if not all(map(_LITERAL.fullmatch, [*ranks, *alphas])):
        problems.append(
            "rank_pattern and alpha_pattern have different expressions, of which one layer may fit "
            "two; here: overrides, which give r and alpha together"
        )
        return {}
    both = [
        (max(one, other, key=len), {"r": ranks[one], "alpha": alphas[other]})
        for one in ranks
        for other in alphas
        if _is_tail(one, other) or _is_tail(other, one)
    ]
    single = [(name, {"r": r}) for name, r in ranks.items()]
    single += [(name, {"alpha": alpha}) for name, alpha in alphas.items()]
    found: dict[str, dict[str, Any]] = {}
    for name, fields in both + single:
        if not any(_is_tail(earlier, name) for earlier in found):
            found[name] = fields
    return found


def _is_tail(short: str, name: str) -> bool:
    return name == short or name.endswith(f".{short}")
