"""The configuration of an adapter: a frozen dataclass that checks itself, and its files."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from hf_lora.errors import ConfigError, listing

ALL_LINEAR = "all-linear"
"""The target that means every linear-like layer except the output head."""

INITS = ("kaiming", "gaussian")
DTYPES = ("float32", "bfloat16", "float16")
OVERRIDABLE = ("r", "alpha", "dropout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What an adapter is: which layers it changes and how.

    Every pattern in ``targets``, ``exclude``, ``train`` and ``overrides`` is a regular expression
    that must match a module's whole dotted path or a whole dotted tail of it: ``q_proj``,
    ``self_attn\\.(q|v)_proj`` and a full path all work.

    Raises:
        ConfigError: One error that lists every wrong field.

    Example:
        >>> LoRAConfig(targets=["q_proj", "v_proj"], r=8, overrides={"v_proj": {"r": 4}}).r
        8
    """

    targets: Sequence[str] | str = ALL_LINEAR
    """Patterns of the layers to adapt, or ``"all-linear"``: adapting every linear layer is what
    reaches full fine-tuning (LoRA Without Regret, 2025)."""

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

    train: Sequence[str] = ()
    """Patterns of modules trained in full and saved with the adapter, such as a fresh head."""

    dtype: str | None = None
    """Data type of the adapter's tensors. None: float32 on a 16-bit or quantized base, where small
    updates would round away, else the base's own."""

    def __post_init__(self) -> None:
        """Normalize lists to tuples and check every field."""
        problems: list[str] = []
        for name in ("targets", "exclude", "train"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name), problems))
        if not self.targets:
            problems.append("targets: empty; name at least one layer to adapt")
        _check_numbers("", {name: getattr(self, name) for name in OVERRIDABLE}, problems)
        if not isinstance(self.rslora, bool):
            problems.append(f"rslora: {self.rslora!r} is not true or false")
        if self.init not in INITS:
            problems.append(f"init: {self.init!r} is not one of {', '.join(INITS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)} or None")
        object.__setattr__(self, "overrides", _overrides(self.overrides, problems))
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
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [str(name) for name in fields if name not in known]
        if unknown:
            raise ConfigError(
                listing(
                    "This LoRAConfig has unknown fields",
                    unknown,
                    f"Known fields: {', '.join(known)}.",
                )
            )
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain data that JSON and YAML can hold."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["overrides"] = {k: dict(v) for k, v in self.overrides.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a configuration from a ``.yaml``, ``.yml`` or ``.json`` file.

        Raises:
            ConfigError: The file cannot be read or parsed, or its fields are wrong.
        """
        return cls.from_dict(read_mapping(path))

    def to_file(self, path: str | Path) -> None:
        """Write every field to a ``.yaml``, ``.yml`` or ``.json`` file."""
        path = Path(path)
        if _is_yaml(path):
            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        else:
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        path.write_text(text, encoding="utf-8")


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file whose content is a mapping.

    Raises:
        ConfigError: Missing, of another kind, or not parseable; the message names the file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if _is_yaml(path) else json.loads(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} cannot be read as a configuration: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not a mapping of fields")
    return content


def _is_yaml(path: Path) -> bool:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"{path} ends in {path.suffix!r}; use .yaml, .yml or .json")
    return path.suffix != ".json"


def _patterns(name: str, value: Any, problems: list[str]) -> tuple[str, ...] | str:
    if value == ALL_LINEAR and name == "targets":
        return ALL_LINEAR
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple, set, frozenset)):
        problems.append(f"{name}: {value!r} is neither a pattern nor a list of patterns")
        return ()
    items = sorted(value) if isinstance(value, (set, frozenset)) else value
    wrong = [item for item in items if not isinstance(item, str) or not item]
    problems.extend(f"{name}: {item!r} is not a pattern" for item in wrong)
    if ALL_LINEAR in items and name == "targets":
        problems.append(f"{name}: {ALL_LINEAR!r} stands alone, not in a list of patterns")
    return tuple(item for item in items if item not in wrong)


def _overrides(value: Any, problems: list[str]) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        problems.append(f"overrides: {value!r} is not a mapping of pattern to fields")
        return {}
    checked: dict[str, dict[str, Any]] = {}
    for pattern, fields in value.items():
        label = f"overrides[{pattern!r}]"
        if not isinstance(pattern, str) or not pattern or not isinstance(fields, Mapping):
            problems.append(f"{label}: {fields!r} is not a mapping of r, alpha or dropout")
            continue
        unknown = [name for name in fields if name not in OVERRIDABLE]
        problems.extend(
            f"{label}: unknown field {name!r}; known: {', '.join(OVERRIDABLE)}" for name in unknown
        )
        _check_numbers(f"{label}.", fields, problems)
        checked[pattern] = dict(fields)
    return checked


def _check_numbers(label: str, fields: Mapping[str, Any], problems: list[str]) -> None:
    r, alpha, dropout = fields.get("r", 1), fields.get("alpha", 1.0), fields.get("dropout", 0.0)
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        problems.append(f"{label}r: {r!r} is not a whole number of at least 1")
    if not _is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
        problems.append(f"{label}alpha: {alpha!r} is not a finite number above 0")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        problems.append(f"{label}dropout: {dropout!r} is not a probability in [0, 1)")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
