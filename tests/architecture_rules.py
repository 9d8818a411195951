"""The rules of the package's shape: what may import what, and what no file may contain.

Every rule is a function from a parsed package to a list of problems, so that test_architecture.py
can run the same rules on hf_lora itself and on small packages with a planted fault.
"""

import ast
import dataclasses
import graphlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

# Bottom first. A module may import from the rows below its own and from its own unit, no others.
LAYERS = (
    ("errors", "text", "version", "targets"),
    ("config", "peft_names"),
    ("compat",),
    ("functional",),
    ("layers",),
    ("kinds",),
    ("planning", "files"),
    ("model",),
    ("adapter_io",),
    ("merging",),
    ("hub",),
    ("file_merging",),
    ("clients",),
    ("algebra",),
    ("integrations",),
    ("api",),
    ("auto_classes",),
    ("recipes",),
    ("report",),
    ("public",),
    ("hf_lora",),  # __init__.py, which hands out the public names when they are asked for
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
# Units of one row do not know each other, except for these.
NEIGHBOURS = {("config", "peft_names"), ("errors", "text"), ("targets", "errors")}

# The only imports that may stand inside a function, each with what importing it early would cost.
LAZY = {
    "bitsandbytes": "optional: quantized bases",
    "torchao": "optional: quantized bases",
    "gguf": "optional: files for llama.cpp",
    "datasets": "optional: `hf-lora train`",
    "trl": "optional: recipes for rewards and preferences",
    "diffusers": "optional: diffusion models",
    "matplotlib": "optional: figures",
    "transformers.conversion_mapping": "the loading machinery, for whoever loads a base only",
    "transformers.core_model_loading": "likewise",
    "transformers.utils.loading_report": "likewise",
    "torch.distributed.tensor": "takes seconds, for models that are spread over processes only",
    "transformers.trainer": "takes seconds, and most programs never train",
    "transformers.modelcard": "takes seconds, for the card that Trainer writes only",
    "hf_lora.integrations.trainer.callback": "its base class lives beside Trainer",
    "hf_lora.recipes.training": "Trainer and rich: most programs never train by a recipe",
    "hf_lora.public": "torch and transformers, which `hf-lora --help` does not need",
    "hf_lora.cli.commands": "likewise",
}
FORBIDDEN = {"peft": "we read and write its format ourselves"}

MOST_LINES = 400
# What a test of a parameter's name would look for; field names such as lora_alpha are not it.
NAME_FRAGMENT = re.compile(r"[._]?lora([._](embedding_)?([AB]([._](weight)?)?)?)?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed source file."""

    name: str
    path: Path
    source: str
    tree: ast.Module

    @property
    def unit(self) -> str:
        """The row entry it belongs to: the first name below the package, or the package itself."""
        return self.name.split(".")[1] if "." in self.name else self.name


@dataclasses.dataclass(frozen=True)
class Import:
    """One import statement's edge: who, whom, where, and whether inside a function."""

    importer: Module
    target: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.importer.name}:{self.line} imports {self.target}"


@dataclasses.dataclass(frozen=True)
class Package:
    """All modules of a package and their imports."""

    modules: dict[str, Module]
    imports: tuple[Import, ...]

    @classmethod
    def read(cls, folder: Path) -> "Package":
        modules = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            source = path.read_text()
            modules[name] = Module(name, path, source, ast.parse(source, str(path)))
        edges = [edge for module in modules.values() for edge in _edges(module, set(modules))]
        return cls(modules, tuple(edges))

    @property
    def internal(self) -> Iterator[Import]:
        """The imports from one module of the package to another."""
        return (edge for edge in self.imports if edge.target in self.modules)


def _edges(module: Module, known: set[str]) -> Iterator[Import]:
    for_types = {
        id(node)
        for block in ast.walk(module.tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    inside_functions = {
        id(node)
        for function in ast.walk(module.tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(module.tree):
        if id(node) in for_types:  # names for annotations only: nothing is imported when it runs
            continue
        for target in _targets(node, module, known):
            yield Import(module, target, node.lineno, id(node) in inside_functions)


def _targets(node: ast.AST, module: Module, known: set[str]) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            origin = _absolute(node, module)
            names = [f"{origin}.{alias.name}" for alias in node.names]
            return [name if name in known else origin for name in names]
        case ast.Call(
            func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(target)), *_],
        ):
            return [target]
    return []


def _absolute(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    above = node.level - (module.path.name == "__init__.py")
    parts = module.name.split(".")
    return ".".join([*parts[: len(parts) - above], *filter(None, [node.module])])


def _within(target: str, names: dict[str, str]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in names)


def direction(package: Package) -> list[str]:
    """Imports that do not go down, and units that have no place in the layout."""
    problems = [
        f"{module.name}: {module.unit!r} is in no row of the layout"
        for module in package.modules.values()
        if module.unit not in RANK
    ]
    for edge in package.internal:
        above, below = edge.importer.unit, package.modules[edge.target].unit
        if {above, below} <= set(RANK) and above != below and (above, below) not in NEIGHBOURS:
            if RANK[above] == RANK[below]:
                problems.append(f"{edge}: {above} and {below} must not know each other")
            elif RANK[above] < RANK[below]:
                problems.append(f"{edge}: {below} stands above {above}")
    return problems


def cycles(package: Package) -> list[str]:
    """A ring of modules that import each other, if there is one."""
    graph: dict[str, set[str]] = {}
    for edge in package.internal:
        graph.setdefault(edge.importer.name, set()).add(edge.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["import cycle: " + " <- ".join(error.args[1])]
    return []


def hidden_imports(package: Package) -> list[str]:
    """Imports inside functions that are not lazy by agreement."""
    return [
        f"{edge} inside a function"
        for edge in package.imports
        if edge.lazy and not _within(edge.target, LAZY)
    ]


def eager_imports(package: Package) -> list[str]:
    """Optional or costly packages that `import hf_lora` would load."""
    return [
        f"{edge} when it is imported: {LAZY[name]}"
        for edge in package.imports
        for name in LAZY
        if not edge.lazy and _within(edge.target, {name: ""})
    ]


def forbidden_imports(package: Package) -> list[str]:
    """Packages that are imported nowhere, lazily or not."""
    return [str(edge) for edge in package.imports if _within(edge.target, FORBIDDEN)]


def missing_docstrings(package: Package) -> list[str]:
    """Modules that do not open by saying what lives there."""
    return [name for name, module in package.modules.items() if not ast.get_docstring(module.tree)]


def long_files(package: Package) -> list[str]:
    """Files that hold more than one concept, judged by their length."""
    return [
        f"{name}: {lines} lines, at most {MOST_LINES}"
        for name, module in package.modules.items()
        if (lines := module.source.count("\n")) > MOST_LINES
    ]


def name_tests(package: Package) -> list[str]:
    """Questions put to a parameter's name that belong to the registry."""
    return [
        f"{module.name}:{node.lineno} {ast.unparse(node)}"
        for module in package.modules.values()
        for node in ast.walk(module.tree)
        if _asks_the_name(node)
    ]


def _asks_the_name(node: ast.AST) -> bool:
    match node:
        case ast.Compare(left=ast.Constant(value=str(text)), ops=[ast.In() | ast.NotIn()]):
            literal = isinstance(node.comparators[0], ast.Set | ast.Tuple | ast.List | ast.Dict)
            return not literal and bool(NAME_FRAGMENT.fullmatch(text))
        case ast.Call(
            func=ast.Attribute(attr="find" | "count" | "index" | "startswith" | "__contains__"),
            args=[ast.Constant(value=str(text)), *_],
        ):
            return bool(NAME_FRAGMENT.fullmatch(text))
    return False


Rule = Callable[[Package], list[str]]
RULES: tuple[Rule, ...] = (
    direction,
    cycles,
    hidden_imports,
    eager_imports,
    forbidden_imports,
    missing_docstrings,
    long_files,
    name_tests,
)
