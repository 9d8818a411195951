"""Model cards as the Hub reads them: the YAML head of a README, its errors, the tags it gives."""

import re
from typing import Any

import yaml

_HEAD = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MODEL_ID = re.compile(r"(?!\.)[\w.-]+(?:/(?!\.)[\w.-]+)?")
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_STRINGS = ("license", "library_name", "pipeline_tag", "license_name", "inference")
_STRINGS_OR_LISTS = ("base_model", "tags", "language", "datasets", "metrics")


def metadata(card: str) -> dict[str, Any]:
    """The YAML head; empty where there is none or it does not parse to a mapping."""
    head = _HEAD.match(card)
    if head is None:
        return {}
    try:
        found = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def problems(card: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) of a model card. A commit whose README has errors is refused."""
    head = _HEAD.match(card)
    if head is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        found = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        return [f"bad YAML in the metadata of the repo card: {error}"], []
    if found is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(found, dict):
        return ["the metadata of the repo card must be a mapping"], []
    return [*_type_errors(found), *_base_model_errors(found), *_index_errors(found)], []


def _type_errors(found: dict[str, Any]) -> list[str]:
    errors = []
    for key in _STRINGS:
        if key in found and not isinstance(found[key], str | bool):
            errors.append(f'"{key}" must be a string')
    for key in _STRINGS_OR_LISTS:
        value = found.get(key, "")
        if isinstance(value, list):
            wrong = [i for i, item in enumerate(value) if not isinstance(item, str)]
            errors += [f'"{key}[{i}]" must be a string' for i in wrong]
        elif not isinstance(value, str):
            errors.append(f'"{key}" must be a string or an array')
    return errors


def _base_model_errors(found: dict[str, Any]) -> list[str]:
    names = found.get("base_model", [])
    labelled = {"base_model": names}
    if isinstance(names, list):
        labelled = {f"base_model[{i}]": name for i, name in enumerate(names)}
    errors = [
        # A folder on somebody's disk is the value that people send by mistake.
        f'"{label}" with value "{name}" is not valid. Use a model id from https://hf.co/models.'
        for label, name in labelled.items()
        if isinstance(name, str) and not _MODEL_ID.fullmatch(name)
    ]
    relation = found.get("base_model_relation", "adapter")
    if relation not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]')
    return errors


def _index_errors(found: dict[str, Any]) -> list[str]:
    index = found.get("model-index", [])
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"model-index[{i}].name" is required')
        elif not isinstance(model.get("results"), list):
            errors.append(f'"model-index[{i}].results" is required')
        else:
            for j, result in enumerate(model["results"]):
                for key in ("task", "dataset", "metrics"):
                    if not isinstance(result, dict) or key not in result:
                        errors.append(f'"model-index[{i}].results[{j}].{key}" is required')
    return errors


def derived_tags(found: dict[str, Any]) -> list[str]:
    """The tags of a model's page: its own, library, licence, and the base with its relation."""
    tags = [str(found[key]) for key in ("library_name", "pipeline_tag") if key in found]
    own = found.get("tags", [])
    tags += own if isinstance(own, list) else [own]
    bases = found.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        tags.append(f"base_model:{base}")
        if "base_model_relation" in found:
            tags.append(f"base_model:{found['base_model_relation']}:{base}")
    if "license" in found:
        tags.append(f"license:{found['license']}")
    return list(dict.fromkeys(tags))
