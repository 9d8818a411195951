"""What the pages take from the code: recipes, commands, the public names. A hook of mkdocs.

A page has ``<!-- generated: NAME -->`` where the text goes.
"""

import ast
import dataclasses
import html
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import typer.main

import hf_lora
from hf_lora import errors
from hf_lora.cli.main import app
from hf_lora.recipes import recipe

_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")
_EXAMPLE = re.compile(r"^Example::?$", re.MULTILINE)
_PICTURE = re.compile(r'<img alt="(?P<alt>[^"]*)" src="(?:\.\./)*pictures/(?P<name>\w+\.svg)" */?>')
_PICTURES = Path(__file__).parent / "pictures"
_NAMED = {"Path": "path", "Any": "any", "Files": "files", "DataSet": "data set", "Mix": "several"}
_SIMPLE = {str: "text", int: "whole number", float: "number", bool: "true or false"}

GROUPS = {
    "Wrap and look": ["wrap", "unwrap", "plan", "Plan", "summary", "Summary", "LoRAConfig"],
    "Train": ["train", "Trained", "optimizer_groups", "register", "base_view", "freeze", "unfreeze",
              "LoRATrainerMixin"],
    "Save, load, share": ["save", "load", "from_pretrained", "push_to_hub", "enable_auto",
                          "disable_auto", "servable", "Servable", "export", "Exported"],
    "Several adapters": ["adapters", "add_adapter", "delete_adapter", "activate", "active_adapters",
                         "use_adapter", "no_adapter"],
    "Arithmetic": ["combine", "subtract", "resize", "similarity", "DerivedAdapter", "Similarity"],
    "Merge": ["merge", "unmerge", "merge_and_unwrap", "merge_checkpoint", "MergeReport"],
    "Layers": ["LoRALayer", "LoRALinear", "apply_lora", "register_layer"],
}  # fmt: skip


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the texts where the marks are."""
    return _MARK.sub(lambda mark: MAKERS[mark[1]](), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Put pictures into the page itself, where its colours reach them."""
    return _PICTURE.sub(_inlined, html)


def _inlined(image: re.Match[str]) -> str:
    drawn = (_PICTURES / image["name"]).read_text()
    return f'<span class="picture" role="img" aria-label="{image["alt"]}">{drawn}</span>'


class PlainDocstrings(griffe.Extension):
    """Turn what docstrings have of Sphinx into what the pages' reader of them knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Read ``:class:`X``` as code, and an example as a section with code in it."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub("Examples:", text)


def recipes() -> str:
    """Return a table of the fields for each section, and for each record inside one."""
    parts = ["## The whole\n", table(recipe.Recipe), ""]
    for name, record in _sections().items():
        parts += [f"## {name}\n", f"{_about(record)}\n", table(record), ""]
        for inside in _inside(record):
            if len(dataclasses.fields(inside)) > 1:
                parts += [f"### {_about(inside).rstrip('.')}\n", table(inside), ""]
    return "\n".join(parts)


def _sections() -> dict[str, Any]:
    """Return those fields of a recipe that are records themselves."""
    hints = typing.get_type_hints(recipe.Recipe)
    found = {name: next(_records(hint), None) for name, hint in hints.items()}
    return {name: record for name, record in found.items() if record is not None}


def _records(hint: Any) -> Iterator[Any]:
    """Yield the dataclasses in a type."""
    if dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _records(part)


def _inside(record: Any) -> list[Any]:
    """Return the records that the fields of one hold, however deep, each once."""
    found: dict[Any, None] = {}
    for hint in typing.get_type_hints(record).values():
        for inner in _records(hint):
            found |= dict.fromkeys([inner, *_inside(inner)])
    return list(found)


def _about(record: Any) -> str:
    return _in_a_cell(inspect.cleandoc(record.__doc__ or "").partition("\n\n")[0])


def table(record: Any) -> str:
    """Return the fields of a dataclass: name, type, default, and the text under each."""
    texts, sections = dict(_texts(record)), _sections() if record is recipe.Recipe else {}
    hints = typing.get_type_hints(record)
    rows = ["| field | is | |", "|---|---|---|"]
    for field in dataclasses.fields(record):
        name, words = f"`{field.name}`", texts[field.name]
        if field.name in sections:
            name, words = f"[{name}](#{field.name})", _about(sections[field.name])
        rows.append(f"| {name} | {_type(hints[field.name])}{_default(field)} | {words} |")
    return "\n".join(rows)


def _texts(record: type) -> Iterator[tuple[str, str]]:
    """Yield each field with the string that stands under it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    assert isinstance(body, ast.ClassDef)
    for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign):
            continue
        assert isinstance(statement.target, ast.Name)
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(str(after.value.value).split())
        yield statement.target.id, _in_a_cell(text)


def _in_a_cell(text: str) -> str:
    """Keep what would end a table's cell, or begin HTML, from doing so."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _type(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [_type(kind) for kind in typing.get_args(hint) if kind is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    name = getattr(hint, "__name__", str(hint))
    if name in ("Mapping", "dict"):
        return "mapping"
    if name in ("Sequence", "Iterable", "list", "tuple"):
        return "list"
    return _SIMPLE.get(hint, _NAMED.get(name, "section"))


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        if isinstance(field.default, bool):
            return f"; `{str(field.default).lower()}`"
        return "" if field.default in (None, ()) else f"; `{field.default}`"
    return "" if field.default_factory is not dataclasses.MISSING else "; **needed**"


def commands() -> str:
    """Return each command with its arguments and options, as ``--help`` has them."""
    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in _commands(group, ()):
        context = typer.Context(command, info_name=f"hf-lora {name}")
        about = _in_a_cell(inspect.cleandoc(command.help or ""))
        usage = " ".join(p.name + ("..." if p.nargs == -1 else "") for p in command.params
                         if p.param_type_name == "argument")  # fmt: skip
        parts += [f"## {name}\n", f"{about}\n", f"`hf-lora {name} {usage}`\n"]
        parts += ["| argument, option | |", "|---|---|"]
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            words, text = parameter.get_help_record(context)
            parts.append(f"| `{words.replace('|', chr(92) + '|')}` | {_in_a_cell(text)} |")
        parts.append("")
    return "\n".join(parts)


def _commands(group: Any, above: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, (*above, name))
        else:
            yield " ".join((*above, name)), command


def names() -> str:
    """Return the public names by what they are for; those of no group, and errors, come last."""
    groups = {title: list(members) for title, members in GROUPS.items()}
    known = {name for members in groups.values() for name in members}
    rest = [name for name in hf_lora.__all__ if name not in known and not name.startswith("_")]
    faults = [n for n in rest if inspect.isclass(getattr(hf_lora, n))
              and issubclass(getattr(hf_lora, n), (Exception, Warning))]  # fmt: skip
    groups["More"] = [name for name in rest if name not in faults]
    groups["Errors"] = faults
    parts = []
    for title, members in groups.items():
        here = [name for name in members if name in hf_lora.__all__]
        if here:
            parts.append(f"## {title}\n")
        if title == "Errors":
            parts.append(f"{tree()}\n")
        parts += [f"::: hf_lora.{name}\n" for name in here]
    return "\n".join(parts)


def tree() -> str:
    """Return the tree of errors as ``errors.py`` draws it."""
    drawn = inspect.cleandoc(errors.__doc__ or "").partition("\n\n")[2]
    return f"<pre>{html.escape(drawn)}</pre>"


MAKERS = {"recipes": recipes, "commands": commands, "names": names}
