"""Reading an adapter folder: everything that can be known without a model is checked here."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from hf_lora.config import LoRAConfig
from hf_lora.errors import AdapterFileError, ConfigError, UnsupportedAdapterError, listing
from hf_lora.files.content import CONFIG_FILE, WEIGHTS_FILE, Factors
from hf_lora.files.peft_format import PREFIX, check_supported, read_slots, read_trained_names
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.files.write import FORMAT, HEADER_KEY, PENDING_FILE
from hf_lora.layers.base import Slot

_LARGEST_JSON = 16_000_000
_FACTOR = re.compile(r"(?:(?P<path>.+)\.)?lora_(?P<which>[AB])(?:\.default)?(?:\.weight)?")
_FOREIGN = re.compile(
    r"\blora_embedding_[AB]\b|\blora_magnitude_vector\b|\blora_[AB]\.bias\b|\btrainable_tokens_delta\b"
    r"|\bvera_|\bhada_|\blokr_"
)
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """A checked adapter folder, its tensors not yet read."""

    directory: Path
    file: TensorFile
    fields: dict[str, Any]
    """``adapter_config.json``."""

    factors: dict[str, Factors]
    """Path of a layer, as the file names it, to where its factors are."""

    slots: dict[str, Slot]
    others: dict[str, str]
    """Every other tensor: path of a parameter, as the file names it, to its key."""

    trained_names: list[str]
    header: dict[str, Any] | None
    """What hf_lora wrote into the weights' header; None for files made elsewhere."""

    config: LoRAConfig | None
    """The configuration in that header."""

    unknown_fields: list[str]
    renamed: list[str]
    """Parts of keys that other libraries put there and that were taken off."""

    @property
    def base(self) -> str | None:
        """Hub id or path of the base model, as the adapter names it."""
        base = self.fields.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    @property
    def revision(self) -> str | None:
        """Revision of the base model, as the adapter names it."""
        revision = self.fields.get("revision")
        return revision if isinstance(revision, str) and revision else None


def is_adapter_folder(directory: Path) -> bool:
    """Say whether a folder holds an adapter's weights."""
    return (directory / WEIGHTS_FILE).is_file()


def read_folder(directory: Path) -> AdapterFolder:
    """Read and check an adapter folder without a model.

    Raises:
        AdapterFileError: Missing, damaged or contradictory; everything that is wrong is named.
        UnsupportedAdapterError: Of a kind that hf_lora does not implement.
    """
    weights = directory / WEIGHTS_FILE
    if not weights.is_file():
        raise AdapterFileError(_what_is_there(directory))
    file = TensorFile(weights)
    header = _own_header(file)
    fields = read_json(directory / CONFIG_FILE)
    pending = directory / PENDING_FILE
    if header is not None and pending.is_file() and _contradictions(header, fields):
        # a save was killed between its two renames; the configuration it meant lies ready
        fields = read_json(pending)
    source = str(directory / CONFIG_FILE)
    unknown = check_supported(fields, source)
    factors, others, renamed = _sort_keys(file)
    ranks = {path: factor.r for path, factor in factors.items()}
    slots = read_slots(fields, ranks, source)
    trained_names = read_trained_names(fields, source)
    if header is not None:
        problems = _contradictions(header, fields) + _slot_contradictions(header, slots)
        if problems:
            raise AdapterFileError(
                listing(f"{source} contradicts the header of {WEIGHTS_FILE}", problems)
            )
        file.check_digest()
    return AdapterFolder(
        directory=directory,
        file=file,
        fields=fields,
        factors=factors,
        slots=slots,
        others=others,
        trained_names=trained_names,
        header=header,
        config=_own_config(header, weights),
        unknown_fields=[] if header is not None else unknown,
        renamed=renamed,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that should hold a mapping and that a stranger may have written.

    Raises:
        AdapterFileError: Missing, too large, not JSON, or not a mapping.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise AdapterFileError(f"{path} is larger than {_LARGEST_JSON} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterFileError(
            f"{path} is missing; an adapter has one beside its weights"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} holds {type(content).__name__}, not a mapping")
    return content


def _what_is_there(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a folder"
    names = sorted(entry.name for entry in directory.iterdir())
    if any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names):
        return (
            f"{directory} holds its weights as a pickle, which can run code when it is read; "
            f"convert it to {WEIGHTS_FILE} where you trust it (in PEFT: save_pretrained)"
        )
    inside = [name for name in names if (directory / name / WEIGHTS_FILE).is_file()]
    if inside:
        return f"{directory} holds no adapter itself, but its folders do: {', '.join(inside)}"
    return f"{directory} holds no {WEIGHTS_FILE}; it has: {', '.join(names[:10]) or 'nothing'}"


def _own_header(file: TensorFile) -> dict[str, Any] | None:
    text = file.metadata.get(HEADER_KEY)
    if text is None:
        return None
    try:
        header = json.loads(text)
        version = header["format"]
        slots, trained, base = header["slots"], header["trained"], header["config"]
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise AdapterFileError(
            f"{file.path}: hf_lora's part of the header is damaged: {error!r}"
        ) from None
    if not isinstance(version, int) or version > FORMAT:
        raise UnsupportedAdapterError(
            f"{file.path} has format {version!r}; this hf_lora reads up to {FORMAT}. Upgrade it."
        )
    if not (isinstance(slots, dict) and isinstance(trained, list) and isinstance(base, dict)):
        raise AdapterFileError(f"{file.path}: hf_lora's part of the header is damaged")
    return header


def _own_config(header: dict[str, Any] | None, path: Path) -> LoRAConfig | None:
    if header is None:
        return None
    try:
        return LoRAConfig.from_dict(header["config"])
    except (ConfigError, TypeError) as error:
        raise AdapterFileError(f"{path}: the configuration in the header: {error}") from error


def _contradictions(header: dict[str, Any], fields: dict[str, Any]) -> list[str]:
    """Compare what decides which modules there are."""
    problems = []
    names = fields.get("modules_to_save") or []
    tails = [path for path in header["trained"] if isinstance(path, str)]
    if isinstance(names, list) and len(names) != len({n for n in names if _is_tail(n, tails)}):
        problems.append(f"modules_to_save = {names!r}, trained in the header = {tails!r}")
    if bool(names) != bool(tails) and not problems:
        problems.append(f"modules_to_save = {names!r}, trained in the header = {tails!r}")
    rslora = bool(fields.get("use_rslora"))
    said = header["config"].get("rslora")
    if rslora != said:
        problems.append(f"use_rslora = {rslora!r}, in the header {said!r}")
    return problems


def _is_tail(name: Any, paths: list[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _slot_contradictions(header: dict[str, Any], slots: dict[str, Slot]) -> list[str]:
    problems = []
    for path in sorted(header["slots"].keys() | slots.keys()):
        there, here = header["slots"].get(path), slots.get(path)
        if not isinstance(there, dict) or here is None:
            missing = "has no tensors" if here is None else "is not in the header"
            problems.append(f"{path} {missing}")
            continue
        for name in ("r", "alpha", "rslora"):
            if there.get(name) != getattr(here, name):
                problems.append(
                    f"{path}: {name} = {getattr(here, name)!r}, in the header {there.get(name)!r}"
                )
    return problems


def _sort_keys(file: TensorFile) -> tuple[dict[str, Factors], dict[str, str], list[str]]:
    """Tell factors from other tensors, and check that factors come in pairs that fit."""
    problems: list[str] = []
    pairs: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    renamed: set[str] = set()
    foreign = [key for key in file.shapes if _FOREIGN.search(key)]
    if foreign:
        raise UnsupportedAdapterError(
            listing(f"{file.path} holds tensors of a kind that hf_lora does not implement", foreign)
        )
    for key in file.shapes:
        plain = _plain_key(key, renamed)
        found = _FACTOR.fullmatch(plain)
        if found is None:
            if plain in others:
                problems.append(f"{key} and {others[plain]} are the same tensor twice")
            others[plain] = key
            continue
        pair = pairs.setdefault(found["path"] or "", {})
        if found["which"] in pair:
            problems.append(f"{key} and {pair[found['which']]} are the same tensor twice")
        pair[found["which"]] = key
    factors = {}
    for path, pair in pairs.items():
        if len(pair) < 2:
            problems.append(f"{path} has lora_{next(iter(pair))} but not its partner")
            continue
        a_shape, b_shape = file.shapes[pair["A"]], file.shapes[pair["B"]]
        if (
            len(a_shape) != 2
            or len(b_shape) != 2
            or a_shape[0] != b_shape[1]
            or not all((*a_shape, *b_shape))
        ):
            problems.append(f"{path}: lora_A {a_shape} and lora_B {b_shape} do not fit together")
            continue
        factors[path] = Factors(pair["A"], pair["B"], a_shape[0], a_shape[1], b_shape[0])
    if not pairs:
        problems.append("there is no lora_A and no lora_B in it")
    if problems:
        raise AdapterFileError(listing(f"{file.path} is not a sound adapter", problems))
    return factors, others, sorted(renamed)


def _plain_key(key: str, renamed: set[str]) -> str:
    """Take off what wrappers put in front of or between a model's own names."""
    plain = key
    while True:
        before = plain
        for prefix in (PREFIX, "module."):
            if plain.startswith(prefix):
                plain = plain.removeprefix(prefix)
                if prefix != PREFIX:
                    renamed.add(prefix)
        for match in _WRAPPERS.findall(plain):
            renamed.add(match)
        plain = _WRAPPERS.sub("", plain)
        if plain == before:
            return plain
