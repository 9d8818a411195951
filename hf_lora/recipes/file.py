"""Reading a recipe file: YAML as people mean it, settings from the command line, every problem."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_lora.config import LoRAConfig
from hf_lora.errors import ConfigError, listing
from hf_lora.recipes.names import SHORT, elsewhere, in_full
from hf_lora.recipes.recipe import Recipe, as_recipe
from hf_lora.recipes.tasks import LANGUAGE_MODELING, TASKS
from hf_lora.recipes.trainer_arguments import check_trainer

_BOOLS = "tag:yaml.org,2002:bool"
_FLOATS = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: ``1e-4`` is a number, ``no`` is a word (``save_strategy: no``).

    A key that stands twice is an error; YAML leaves it to the reader, and PyYAML takes the last.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag not in (_BOOLS, _FLOATS)]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, once every key of it was seen once."""
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_BOOLS, re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOATS,
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf)$|\.(nan|NaN)$"),
    list("-+.0123456789"),
)


def read_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any],
    settings: Iterable[str] = (),
    output: Path | None = None,
) -> Recipe:
    """Read a recipe and check all of it, without loading any model.

    Args:
        source: A .yaml, .yml or .json file, or what it would hold.
        settings: ``section.field=value`` each, taken instead of what the file says.
        output: Likewise, for the output folder; relative to the current folder.

    Raises:
        ConfigError: The file cannot be read; or one error that lists everything that is wrong.
    """
    name, folder, content = _content(source)
    problems: list[str] = []
    for setting in settings:
        _set(content, setting, problems)
    if output is not None:
        content["output"] = str(output.resolve())
    if "trainer" in content:
        content["trainer"] = in_full(content["trainer"], problems)
    recipe = as_recipe(content, folder, problems, elsewhere)
    data = content.get("data")
    has_eval = isinstance(data, Mapping) and data.get("eval") is not None
    task = TASKS.get(str(content.get("task")), TASKS[LANGUAGE_MODELING])
    check_trainer(content.get("trainer"), has_eval, task, problems)
    if problems or recipe is None:
        raise ConfigError(listing(f"{name} cannot be used", problems))
    return recipe


def _content(source: Any) -> tuple[str, Path, dict[str, Any]]:
    """Return what to call a recipe, the folder that its paths are relative to, and what it says."""
    if isinstance(source, Mapping):
        return "The recipe", Path(), _plain(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"A recipe is a .yaml, .yml or .json file, or a mapping of its sections; this is a "
            f"{type(source).__name__}."
        )
    path = Path(source)
    return str(path), path.parent, _parse(path)


def _plain(value: Any) -> Any:
    """Return what a mapping in Python says as a file would say it; nothing of it is changed."""
    if isinstance(value, LoRAConfig):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _parse(path: Path) -> dict[str, Any]:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"{path} ends in {path.suffix!r}; a recipe is a .yaml, .yml or .json")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as a recipe: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not a mapping of fields")
    return content


def _set(content: dict[str, Any], setting: str, problems: list[str]) -> None:
    address, equals, text = setting.partition("=")
    *sections, name = address.split(".")
    if not equals or not all((*sections, name)):
        problems.append(f"--set {setting}: is not section.field=value")
        return
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problems.append(f"--set {setting}: {error}")
        return
    place: Any = content
    for section in sections:
        if isinstance(place.get(section), str) and section == "base":
            place[section] = {"model": place[section]}
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            problems.append(f"--set {setting}: {section} has no fields")
            return
    if sections == ["trainer"]:
        name = SHORT.get(name, name)
        # what the file calls it by another name is replaced as well
        for other in [other for other in place if SHORT.get(other, other) == name]:
            del place[other]
    place[name] = value
