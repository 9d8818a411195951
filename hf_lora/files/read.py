"""Reading an adapter folder: everything that can be known without a model is checked here."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from hf_lora.config import LoRAConfig
from hf_lora.errors import AdapterFileError, UnsupportedAdapterError, listing
from hf_lora.files.attention import attention_slots, with_attention
from hf_lora.files.biases import biased_slots, with_biases
from hf_lora.files.bounded_regex import Budget
from hf_lora.files.commit_note import noted_fields
from hf_lora.files.data import CONFIG_FILE, WEIGHTS_FILE, LayerTensors
from hf_lora.files.foreign import find_foreign
from hf_lora.files.header import OwnHeader, contradictions, read_header
from hf_lora.files.keys import sort_keys
from hf_lora.files.labels import read_labels
from hf_lora.files.peft_format import (
    ORIGIN_FIELDS,
    check_supported,
    read_slots,
    read_trained_names,
    read_tying,
    weights_named,
)
from hf_lora.files.safe_json import read_json
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.files.set_note import mixture
from hf_lora.files.stacked_experts import with_experts
from hf_lora.files.token_rows import FileRows, differences, read_rows
from hf_lora.layers.layer_config import LayerConfig
from hf_lora.text import some

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_MOST_NAMES = 10


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """A checked adapter folder, its tensors not yet read."""

    directory: Path
    file: TensorFile
    fields: dict[str, Any]
    """``adapter_config.json``."""

    factors: dict[str, LayerTensors]
    """Path of a layer, as the file names it, to its tensors."""

    slots: dict[str, LayerConfig]
    others: dict[str, str]
    """Every other tensor: path of a parameter, as the file names it, to its key."""

    rows: dict[str, FileRows]
    """Path of each module of which some rows are trained, as the file names it, to these."""

    tied_rows: dict[str, tuple[int, ...]]
    """Names in the configuration for which there are no rows in the file, to the rows that it says;
    they are right where PEFT ties their module to one that has them."""

    originals: dict[str, str]
    """The same for what the base had in modules trained in full, where the file has that, too."""

    trained_names: list[str]
    """Names of the modules trained in full, as PEFT understands them."""

    ties_embeddings: bool
    """Whether PEFT is asked to have one tensor for the input embeddings and what is tied to them.
    """

    own: OwnHeader | None
    """What hf_lora wrote into the weights' header; None for files made elsewhere."""

    renamed: list[str]
    """Parts of keys that other libraries put there and that were taken off."""

    told: list[str]
    """What was ignored or taken from elsewhere, a line each."""

    patience: Budget
    """What matching the patterns of this folder may still cost."""

    labels: dict[str, Any]
    """A classifier's labels, as arguments of a model's configuration; empty if it names none."""

    format: str = "PEFT's format"
    """Whose format it is in, for people."""

    only_shown: str | None = None
    """Why it can be looked at and nothing else, if that is so."""

    def check_usable(self) -> None:
        """Raise UnsupportedAdapterError if it can be looked at only."""
        if self.only_shown is not None:
            raise UnsupportedAdapterError(
                f"{self.directory} is in {self.format} and can only be shown: {self.only_shown}"
            )

    @property
    def header(self) -> dict[str, Any] | None:
        """What hf_lora wrote into the weights' header, as it stands there."""
        return None if self.own is None else self.own.raw

    @property
    def config(self) -> LoRAConfig | None:
        """The configuration in that header."""
        return None if self.own is None else self.own.config

    @property
    def origin(self) -> dict[str, Any]:
        """What the adapter says of its base, its task and its class."""
        return {name: self.fields.get(name) for name in ORIGIN_FIELDS}

    @property
    def base(self) -> str | None:
        """Hub id or path of the base model, as the adapter names it."""
        return self.fields.get("base_model_name_or_path") or None

    @property
    def revision(self) -> str | None:
        """Revision of the base model, as the adapter names it."""
        return self.fields.get("revision") or None


def is_adapter_folder(directory: Path) -> bool:
    """Say whether a folder holds an adapter's weights."""
    return os.path.isfile(directory / WEIGHTS_FILE)


def is_own(weights: Path) -> bool:
    """Say whether hf_lora wrote a file of weights, whose header then has the configuration.

    Raises:
        AdapterFileError: It is damaged.
    """
    return read_header(TensorFile(weights).metadata, weights) is not None


def read_folder(directory: Path) -> AdapterFolder:
    """Read and check an adapter folder without a model.

    Raises:
        AdapterFileError: Missing, damaged or contradictory; everything that is wrong is named.
        UnsupportedAdapterError: Of a kind that hf_lora does not implement.
    """
    if directory.name == WEIGHTS_FILE and os.path.isfile(directory):
        directory = directory.parent
    weights = directory / WEIGHTS_FILE
    foreign = None if os.path.isfile(weights) else find_foreign(directory)
    if foreign is None and not os.path.isfile(weights):
        raise AdapterFileError(_what_is_there(directory))
    file = TensorFile(weights) if foreign is None else foreign.file
    file.check_digest()
    if foreign is None:
        own = read_header(file.metadata, weights)
        fields, told = _configuration(directory, own)
        mixed = mixture(directory)
        told += [mixed] if mixed else []
        source = str(directory / CONFIG_FILE)
    else:
        own, fields, told, weights = None, foreign.fields, [*foreign.told], file.path
        source = str(weights)
    unknown = check_supported(fields, source)
    if unknown:
        told.append(f"{CONFIG_FILE} has fields that nobody here knows; ignored: {some(unknown)}")
    keys = sort_keys(file)
    factors, others = with_biases(keys.factors, keys.others, fields, file)
    named = weights_named(fields, source)
    factors, parts = with_experts(factors, named, str(weights))
    ties_embeddings = read_tying(fields, factors, source)
    patience = Budget(source)
    factors, outs = with_attention(factors)
    ranks = {path: held.rank for path, held in factors.items() if path not in outs}
    slots = foreign and foreign.slots(ranks)
    slots = slots or read_slots(fields, ranks, source, patience, parts)
    slots = biased_slots(attention_slots(slots, factors, outs, source), factors)
    trained_names = read_trained_names(fields, source)
    rows, tied_rows = read_rows(fields, keys.rows, file.shapes, source)
    if own is not None:
        told += own.told
        problems = contradictions(own, fields, slots, trained_names)
        problems += differences(own.rows, rows)
        problems += [f"{name} has no tensor" for name in own.buffers if name not in others]
        if problems:
            raise AdapterFileError(
                listing(f"{source} contradicts the header of {WEIGHTS_FILE}", problems)
            )
        slots = {path: own.slots[path] for path in slots}
        if fields.get("lora_dropout", 0.0) != own.fields.get("lora_dropout", 0.0):
            told.append("lora_dropout was changed and is ignored; the header has it for each layer")
    shapes = [file.shapes[key] for key in others.values()]
    return AdapterFolder(
        directory=directory,
        file=file,
        fields=fields,
        factors=factors,
        slots=slots,
        others=others,
        rows=rows,
        tied_rows=tied_rows,
        originals=keys.originals,
        trained_names=trained_names,
        ties_embeddings=ties_embeddings,
        own=own,
        renamed=keys.renamed,
        told=told,
        patience=patience,
        labels={} if own is None else read_labels(own.raw, shapes, str(weights)),
        format="PEFT's format" if foreign is None else foreign.format,
        only_shown=foreign and foreign.only_shown,
    )


def _configuration(directory: Path, own: OwnHeader | None) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of ``adapter_config.json``, wherever they are, and what to tell of it."""
    noted = noted_fields(directory)
    if noted is not None:
        return noted, []
    path = directory / CONFIG_FILE
    if own is not None and not os.path.lexists(path):
        return own.fields, [f"{CONFIG_FILE} is missing; the header of {WEIGHTS_FILE} has it all"]
    return read_json(path), []


def _what_is_there(directory: Path) -> str:
    if not os.path.isdir(directory):
        return f"{directory} is not a folder"
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        return f"{directory} cannot be read: {error}"
    if any(name.endswith(_PICKLES) for name in names):
        return (
            f"{directory} holds its weights as a pickle, which can run code when it is read; "
            f"convert it to {WEIGHTS_FILE} where you trust it (in PEFT: save_pretrained)"
        )
    inside = [name for name in names if is_adapter_folder(directory / name)]
    if inside:
        return (
            f"{directory} holds no adapter itself, but its folders do: {some(inside, _MOST_NAMES)}"
        )
    found = some(names, _MOST_NAMES) or "nothing"
    return f"{directory} holds no {WEIGHTS_FILE}; it has: {found}"
