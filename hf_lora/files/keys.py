"""The names of tensors in an adapter file: factors told from others, wrappers' parts taken off."""

import re

from hf_lora.errors import AdapterFileError, UnsupportedAdapterError, listing
from hf_lora.files.data import Factors
from hf_lora.files.safetensors_io import TensorFile
from hf_lora.text import show

PREFIX = "base_model.model."

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED = re.compile("|".join(_WRAPPERS))
_BEFORE = re.compile(rf"((?:(?:module|{'|'.join(_WRAPPERS)})\.)*){re.escape(PREFIX)}")
# A training's own state has the adapter's name in it, which PEFT takes off when it saves.
_ADAPTER = r"(?:\.(?!weight$)(?P<adapter>[^.]+))?"
_FACTOR = re.compile(rf"(?:(?P<path>.+)\.)?lora_(?P<which>[AB]){_ADAPTER}(?:\.weight)?")
_TRAINED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<role>[^.]+)")
_BASE_LAYER = re.compile(r"(?P<path>.+)\.base_layer\.(?P<role>[^.]+)")
_FOREIGN = re.compile(
    r"\blora_embedding_[AB]\b|\blora_magnitude_vector\b|\blora_[AB](?:\.[^.]+)?\.bias\b"
    r"|\btrainable_tokens_delta\b|\bvera_|\bhada_|\blokr_|\bia3_"
)


def without_wrappers(name: str) -> str:
    """Take off what torch.compile, FSDP and checkpointing put into a model's names."""
    if _WRAPPED.search(name) is None:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def sort_keys(file: TensorFile) -> tuple[dict[str, Factors], dict[str, str], list[str]]:
    """Tell factors from other tensors, and check that factors come in pairs that fit.

    Returns:
        Path of each layer to its factors; name of every other tensor to its key (the base's own
        weight of an adapted layer under its plain name); and the parts that were taken off.

    Raises:
        UnsupportedAdapterError: There are tensors of other methods.
        AdapterFileError: A tensor stands twice, lacks its partner or does not fit it.
    """
    foreign = [key for key in file.shapes if _FOREIGN.search(key)]
    if foreign:
        raise UnsupportedAdapterError(
            listing(f"{file.path} holds tensors of a kind that hf_lora does not implement", foreign)
        )
    _refuse_convolutions(file)
    problems: list[str] = []
    pairs: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    renamed: set[str] = set()
    adapters: set[str] = set()
    for key in file.shapes:
        plain = _plain_key(key, renamed)
        found = _FACTOR.fullmatch(plain)
        held = found or _TRAINED.fullmatch(plain)
        if held is not None and held["adapter"] is not None:
            adapters.add(held["adapter"])
        if held is not None and found is None:
            plain = f"{held['path']}.{held['role']}"
        place, name = (pairs.setdefault(found["path"] or "", {}), found["which"]) if found else (
            others, plain)  # fmt: skip
        if name in place:
            problems.append(f"{key} and {place[name]} are the same tensor twice")
        place[name] = key
    if len(adapters) > 1:
        raise AdapterFileError(
            listing(
                f"{file.path} holds the tensors of several adapters",
                sorted(map(show, adapters)),
                "Keep those of one of them, or save each into a folder of its own.",
            )
        )
    renamed.update(f".{name}" for name in adapters - {"default"})
    factors = {}
    for path, pair in pairs.items():
        fault = _pair_fault(file, pair)
        if fault:
            problems.append(f"{path or 'the model itself'} {fault}")
            continue
        (r, in_features), (out_features, _) = (file.shapes[pair[which]] for which in "AB")
        factors[path] = Factors(pair["A"], pair["B"], r, in_features, out_features)
    others = _with_base_layers(others, factors, problems)
    if not pairs:
        problems.append("there is no lora_A and no lora_B in it")
    if problems:
        raise AdapterFileError(listing(f"{file.path} is not a sound adapter", problems))
    return factors, others, sorted(renamed)


def _refuse_convolutions(file: TensorFile) -> None:
    found = [
        f"{key}: {shape}"
        for key, shape in file.shapes.items()
        if len(shape) > 2 and _FACTOR.fullmatch(key)
    ]
    if found:
        raise UnsupportedAdapterError(
            listing(f"{file.path} holds factors of convolutions, not of linear layers", found)
        )


def _plain_key(key: str, renamed: set[str]) -> str:
    plain = key
    before = _BEFORE.match(key)
    if before is not None:
        plain = key[before.end() :]
        renamed.update(f"{part}." for part in before[1].split(".") if part)
    bare = without_wrappers(plain)
    if bare != plain:
        renamed.update(f"{part}." for part in plain.split(".") if part in _WRAPPERS)
    return bare


def _pair_fault(file: TensorFile, pair: dict[str, str]) -> str | None:
    if len(pair) < 2:
        return f"has lora_{next(iter(pair))} but not its partner"
    a_shape, b_shape = file.shapes[pair["A"]], file.shapes[pair["B"]]
    fits = len(a_shape) == len(b_shape) == 2 and a_shape[0] == b_shape[1]
    if not fits or 0 in (*a_shape, *b_shape):
        return f"has lora_A {a_shape} and lora_B {b_shape}, which do not fit together"
    for which, key in pair.items():
        dtype = file.dtypes[key]
        if not dtype.is_floating_point or dtype.itemsize < 2:
            return f"has lora_{which} of type {str(dtype).removeprefix('torch.')}"
    return None


def _with_base_layers(
    others: dict[str, str], factors: dict[str, Factors], problems: list[str]
) -> dict[str, str]:
    """Give the base's own tensors of adapted layers their plain names (PEFT: ``.base_layer.``)."""
    named: dict[str, str] = {}
    for name, key in others.items():
        found = _BASE_LAYER.fullmatch(name)
        if found and found["path"] in factors:
            name = f"{found['path']}.{found['role']}"
        if name in named:
            problems.append(f"{key} and {named[name]} are the same tensor twice")
        named[name] = key
    return named
