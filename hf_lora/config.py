"""The configuration of an adapter: a frozen dataclass that checks itself, and its files."""

import dataclasses
import json
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from hf_lora.errors import ConfigError, listing
from hf_lora.peft_names import PeftConfig, hint, is_peft_config, translate

ALL_LINEAR = "all-linear"
"""The target that means every linear-like layer except the output head and experts."""

EXPERTS = "experts"
WORDS = (ALL_LINEAR, "attention", "mlp", EXPERTS)
"""The targets that are no patterns: what they mean is told from a model's structure."""

INITS = ("kaiming", "gaussian")
BIASES = ("none", "lora_only", "all")
DTYPES = ("float32", "bfloat16", "float16")
OVERRIDABLE = ("r", "alpha", "dropout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What an adapter is: which layers it changes and how.

    Every pattern in ``targets``, ``exclude``, ``train`` and ``overrides`` is a regular expression
    that must match a module's whole dotted path or a whole dotted tail of it: ``q_proj``,
    ``self_attn\\.(q|v)_proj`` and a full path all work.

    Four words are reserved in ``targets``, ``exclude`` and ``overrides``, and mean layers by what
    they are part of, whatever they are called: ``all-linear`` (every linear layer except the output
    head and experts), ``attention``, ``mlp`` (feed-forward networks in blocks, shared experts
    included) and ``experts``. A module of that name is meant by ``.*attention``.

    Raises:
        ConfigError: One error that lists every wrong field.

    Example:
        >>> LoRAConfig(targets=["q_proj", "v_proj"], r=8, overrides={"v_proj": {"r": 4}}).r
        8
    """

    targets: Sequence[str] | str = ALL_LINEAR
    """Patterns of the layers to adapt, and words: adapting every linear layer is what reaches full
    fine-tuning (LoRA Without Regret, 2025)."""

    exclude: Sequence[str] = ()
    """Patterns of layers to leave alone although a target matches them."""

    r: int = 16
    """Rank: the inner size of the two matrices, at least 1 and at most the layer's smaller side."""

    alpha: float = 32.0
    """Strength: the low-rank product is scaled by ``alpha / r``. Twice the rank is common."""

    dropout: float = 0.0
    """Probability, in [0, 1), of dropping an element of the low-rank path's input in training."""

    rslora: bool = False
    """Scale by ``alpha / sqrt(r)`` instead, which keeps high ranks trainable (arXiv 2312.03732)."""

    init: str = "kaiming"
    """How A starts: ``"kaiming"`` (uniform in ±1/sqrt(in)) or ``"gaussian"`` (deviation 1/r).
    B starts at zero, so that the wrapped model begins as the model it was."""

    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Pattern to other ``r``, ``alpha`` or ``dropout``; the first pattern that matches wins."""

    train: Sequence[str] | None = None
    """Patterns of modules trained in full and saved with the adapter. What the base's checkpoint
    did not fill, such as a fresh head, is as if it were named, unless this is ``()``."""

    bias: str = "none"
    """Which biases of the base train, and are saved with the adapter: ``"none"``, ``"lora_only"``
    (those of the adapted layers) or ``"all"`` (every tensor of the model called ``bias``)."""

    lora_bias: bool = False
    """Whether B has a bias of its own, scaled as the update is. It starts at zero."""

    train_rows: Mapping[str, Sequence[int | str]] = dataclasses.field(default_factory=dict)
    """Pattern of embeddings or output heads to the numbers of the rows that train and are saved
    with the adapter, and nothing else of them: new tokens, for instance. Tokens may stand for
    numbers where a tokenizer is given with the configuration. Modules that are tied have the rows
    together. With ``targets=()`` nothing else trains."""

    dtype: str | None = None
    """Data type of the adapter's tensors. None: float32 on a 16-bit or quantized base, where small
    updates would round away, else the base's own."""

    def __new__(cls, **fields: Any) -> Self:
        """Say what an unknown field is called here, where a dataclass raises a bare TypeError."""
        _check_names(cls, fields)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Bring every field to one plain form, so that equal meanings are equal, and check it."""
        problems: list[str] = []
        empty = not isinstance(self.targets, str) and self.targets in ((), [], set(), frozenset())
        if empty and not self.train_rows:
            problems.append("targets: empty; name at least one layer to adapt")
        numbers_given = {name: getattr(self, name) for name in OVERRIDABLE}
        normal = {
            "targets": _targets(self.targets, problems),
            "exclude": _patterns("exclude", self.exclude, problems),
            "train": None if self.train is None else _patterns("train", self.train, problems),
            "train_rows": _train_rows(self.train_rows, problems),
            **_numbers("", numbers_given, problems),
            "overrides": _overrides(self.overrides, problems),
            # torch.bfloat16 and "torch.bfloat16" mean what "bfloat16" means
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.rslora, bool):
            problems.append(f"rslora: {self.rslora!r} is not true or false")
        if not isinstance(self.lora_bias, bool):
            problems.append(f"lora_bias: {self.lora_bias!r} is not true or false")
        if self.bias not in BIASES:
            problems.append(f"bias: {self.bias!r} is not one of {', '.join(BIASES)}")
        if self.init not in INITS:
            problems.append(f"init: {self.init!r} is not one of {', '.join(INITS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)} or None")
        if problems:
            raise ConfigError(listing("This LoRAConfig cannot be used", problems))

    def __hash__(self) -> int:
        """Equal configurations have equal hashes, although ``overrides`` is a mapping."""
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Build a configuration from plain data; unknown fields are an error that lists the known.

        Raises:
            ConfigError: ``fields`` is no mapping, or a field is unknown or wrong.
        """
        if not isinstance(fields, Mapping):
            raise ConfigError(f"A LoRAConfig is a mapping of fields, not {fields!r}")
        _check_names(cls, fields)  # a name that is no text could not be passed on
        return cls(**fields)

    @classmethod
    def from_peft(cls, config: PeftConfig | Mapping[str, Any]) -> Self:
        """Build the configuration that means what one of PEFT's means.

        Args:
            config: PEFT's ``LoraConfig``, or the content of its ``adapter_config.json``. What PEFT
                would adapt, :func:`wrap` adapts, with the same ranks and strengths.

        Raises:
            ConfigError: It is of another method, uses what hf_lora does not implement, or leaves
                open which layers it means; all of it is listed.
        """
        if not (is_peft_config(config) or isinstance(config, Mapping)):
            raise ConfigError(f"{config!r} is neither PEFT's LoraConfig nor its fields")
        return cls(**translate(config, WORDS))

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain data that JSON and YAML can hold."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["overrides"] = {k: dict(v) for k, v in self.overrides.items()}
        fields["train_rows"] = {k: list(v) for k, v in self.train_rows.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a configuration from a ``.yaml``, ``.yml`` or ``.json`` file.

        Raises:
            ConfigError: The file cannot be read or parsed, or its fields are wrong.
        """
        return cls.from_dict(read_mapping(path))

    def to_file(self, path: str | Path) -> None:
        """Write every field to a ``.yaml``, ``.yml`` or ``.json`` file.

        Raises:
            ConfigError: The name ends otherwise, or the file cannot be written.
        """
        path = Path(path)
        if _is_yaml(path):
            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        else:
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        try:
            path.write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise ConfigError(f"{path} cannot be written: {error}") from error


def _check_names(cls: type[LoRAConfig], fields: Mapping[Any, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [f"{name}{hint(str(name))}" for name in fields if name not in known]
    if unknown:
        raise ConfigError(
            listing(
                "This LoRAConfig has unknown fields", unknown, f"Known fields: {', '.join(known)}."
            )
        )


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file whose content is a mapping.

    Raises:
        ConfigError: Missing, of another kind, or not parseable; the message names the file.
    """
    path = Path(path)
    parse = yaml.safe_load if _is_yaml(path) else json.loads
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as a configuration: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not a mapping of fields")
    return content


def _is_yaml(path: Path) -> bool:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"{path} ends in {path.suffix!r}; use .yaml, .yml or .json")
    return path.suffix != ".json"


def _targets(value: Any, problems: list[str]) -> tuple[str, ...] | str:
    patterns = _patterns("targets", value, problems)
    return ALL_LINEAR if patterns == (ALL_LINEAR,) else patterns


def _patterns(name: str, value: Any, problems: list[str]) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple, set, frozenset)):
        problems.append(f"{name}: {value!r} is neither a pattern nor a list of patterns")
        return ()
    good = []
    for item in items:
        fault = _pattern_fault(item)
        if fault:
            problems.append(f"{name}: {item!r} {fault}")
        else:
            good.append(item)
    # a set has no order of its own, and files must not differ from run to run
    return tuple(sorted(good) if isinstance(items, (set, frozenset)) else good)


def _pattern_fault(pattern: Any) -> str | None:
    if not isinstance(pattern, str) or not pattern:
        return "is not a pattern"
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is not a regular expression: {error}"
    if compiled.flags & ~re.UNICODE:
        return "sets a flag for all of it; write (?i:...) instead of (?i)..."
    return None


def _overrides(value: Any, problems: list[str]) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        problems.append(f"overrides: {value!r} is not a mapping of pattern to fields")
        return {}
    checked: dict[str, dict[str, Any]] = {}
    for pattern, fields in value.items():
        label = f"overrides[{pattern!r}]"
        fault = _pattern_fault(pattern)
        if fault:
            problems.append(f"overrides: {pattern!r} {fault}")
        if not isinstance(fields, Mapping) or not fields:
            problems.append(f"{label}: {fields!r} is not a mapping of r, alpha or dropout")
            continue
        unknown = [name for name in fields if name not in OVERRIDABLE]
        problems.extend(
            f"{label}: unknown field {name!r}; known: {', '.join(OVERRIDABLE)}" for name in unknown
        )
        known = {name: fields[name] for name in OVERRIDABLE if name in fields}
        checked[pattern] = _numbers(f"{label}.", known, problems)
    return checked


def _train_rows(value: Any, problems: list[str]) -> dict[str, tuple[int | str, ...]]:
    """Return patterns to numbers, in ascending order and each once, and then tokens."""
    if not isinstance(value, Mapping):
        problems.append(f"train_rows: {value!r} is not a mapping of pattern to rows or tokens")
        return {}
    checked: dict[str, tuple[int | str, ...]] = {}
    for pattern, given in value.items():
        fault = _pattern_fault(pattern)
        if fault:
            problems.append(f"train_rows: {pattern!r} {fault}")
            continue
        rows: list[Any] = [given]
        if not isinstance(given, (str, bytes, Mapping)) and isinstance(given, Iterable):
            rows = given.tolist() if hasattr(given, "tolist") else list(given)  # type: ignore[attr-defined]
        ids = {int(row) for row in rows if _is_row(row)}
        tokens = dict.fromkeys(row for row in rows if isinstance(row, str) and row)
        wrong = [r for r in rows if not _is_row(r) and not (isinstance(r, str) and r)]
        if wrong or not rows:
            what = f"{wrong[0]!r} is neither a number of a row nor a token" if wrong else "no rows"
            problems.append(f"train_rows[{pattern!r}]: {what}")
        checked[pattern] = (*sorted(ids), *tokens)
    return checked


def _is_row(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0


def _numbers(label: str, fields: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the fields as ``int`` and ``float``, whatever library's numbers they were."""
    normal: dict[str, Any] = {}
    for name, value in fields.items():
        number = _as_number(value, whole=name == "r")
        if number is None or not _IN_RANGE[name](number):
            problems.append(f"{label}{name}: {value!r} is not {_RANGES[name]}")
        else:
            normal[name] = number
    return normal


_RANGES = {
    "r": "a whole number of at least 1",
    "alpha": "a finite number above 0",
    "dropout": "a probability in [0, 1)",
}
_IN_RANGE: dict[str, Callable[[float], bool]] = {
    "r": lambda r: r >= 1,
    "alpha": lambda alpha: math.isfinite(alpha) and alpha > 0,
    "dropout": lambda dropout: 0 <= dropout < 1,
}


def _as_number(value: Any, *, whole: bool) -> float | None:
    if isinstance(value, bool):
        return None
    if whole:
        return int(value) if isinstance(value, numbers.Integral) else None
    try:
        return float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:
        return None
