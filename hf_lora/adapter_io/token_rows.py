"""Trained rows between files and models: what ties them, what PEFT would do, and room for them.

PEFT (0.21) ties the rows of the input embeddings by itself, with whatever transformers ties to
them, and finds modules by the ends of their names. A linear layer with rows it computes without
its bias.
"""

import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from hf_lora.adapter_io.base_weights import vocabulary
from hf_lora.adapter_io.rename import Renaming, rename
from hf_lora.adapter_io.ties import input_embeddings, tied_by_peft
from hf_lora.adapter_io.vocabulary import embedding
from hf_lora.compat.deepspeed import shape_of
from hf_lora.compat.transformers import is_pretrained
from hf_lora.errors import HfLoRAWarning, SaveError, listing
from hf_lora.files.fingerprint import from_json
from hf_lora.files.read import AdapterFolder
from hf_lora.kinds.token_rows import rows_fault
from hf_lora.layers.kind import parameter_of
from hf_lora.layers.token_rows import TokenRows
from hf_lora.layers.uncalled import uncalled
from hf_lora.planning.token_rows import Rows
from hf_lora.text import some


def names_for_peft(model: nn.Module, rows: Rows) -> tuple[str, ...]:
    """Return the modules whose rows PEFT must be told of, so that it computes the same.

    Raises:
        SaveError: It would compute something else, whatever it is told.
    """
    source, tied = input_embeddings(model), tied_by_peft(model)
    by_itself: set[str] = set()
    problems = []
    if (
        source is not None
        and source in rows
        and not any(p in rows and rows[p].ids != rows[source].ids for p in tied)
    ):
        by_itself = tied
        if not tied <= {path for path, own in rows.items() if own.of == source}:
            problems.append(f"{source} has rows, and PEFT would have them in {some(tied)} as well")
    names = tuple(path for path in rows if path not in by_itself)
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    for name in names:
        problems += [
            f"{path} ends like {name}, and PEFT would take it for another with such rows"
            for path in paths
            if path.endswith(name) and path != name
        ]
    if problems:
        raise SaveError(listing("PEFT's format cannot say which rows these are", problems))
    biased = [p for p in rows if getattr(model.get_submodule(p), "bias", None) is not None]
    if biased:
        warnings.warn(
            f"PEFT leaves out the bias of {some(biased)} where rows of it are trained, so that its "
            "outputs are others than these. hf_lora computes them with it.",
            HfLoRAWarning,
            stacklevel=4,
        )
    return names


def match_rows(
    folder: AdapterFolder, model: nn.Module, names: Renaming, problems: list[str]
) -> tuple[dict[str, TokenRows], dict[str, str]]:
    """Return the rows that modules of a model get, and where in the file each is.

    Args:
        folder: The adapter.
        model: The model.
        names: How the file's names become the model's.
        problems: Gets a line for each thing that does not fit.

    Returns:
        Path to rows, in the model's order; and path to key, for those that are nobody else's.
    """
    if not folder.rows:
        problems += [f"there are no rows of {name} in the file" for name in folder.tied_rows]
        return {}, {}
    modules = dict(model.named_modules())
    silent = uncalled(modules)
    files = {names.module(name): rows for name, rows in folder.rows.items()}
    tied = _tied(folder, model, names)
    found = {path: TokenRows(rows.ids, tied.get(path)) for path, rows in files.items()}
    found |= {path: TokenRows(files[of].ids, of) for path, of in tied.items() if of in files}
    for path, rows in found.items():
        module, of = modules.get(path), rows.of
        fault = "the model has no such module" if module is None else silent.get(path)
        fault = fault or rows_fault(module)  # type: ignore[arg-type]
        if fault is None:
            here = shape_of(parameter_of(module, "weight"))  # type: ignore[arg-type]
            fault = _fault(folder.file.shapes[files[of or path].key], rows.ids, here)
        if fault is None and of in files and path in files:
            (_, one), (_, other) = folder.file.read([files[path].key, files[of].key])
            if not torch.equal(one, other):
                fault = f"it has other rows in the file than {of}, with which they are one tensor"
        if fault:
            problems.append(f"{path or 'the model itself'}: {fault}")
    for name, ids in folder.tied_rows.items():
        if not any(path.endswith(name) and rows.ids == ids for path, rows in found.items()):
            problems.append(f"there are no rows of {name} in the file")
    ordered = {path: found[path] for path in modules if path in found}
    return ordered, {path: files[path].key for path, rows in ordered.items() if rows.of is None}


def _fault(there: tuple[int, ...], ids: tuple[int, ...], here: tuple[int, ...]) -> str | None:
    if there[1] != here[1]:
        return f"the adapter has rows of {there[1]} numbers, and these have {here[1]}"
    if max(ids) >= here[0]:
        return (
            f"the adapter has row {max(ids)}, and here are {here[0]}; "
            f"model.resize_token_embeddings({max(ids) + 1}) makes room"
        )
    return None


def _tied(folder: AdapterFolder, model: nn.Module, names: Renaming) -> dict[str, str]:
    """Return the paths of modules that share the rows of another, to that one's."""
    if folder.own is not None:
        said = folder.own.rows.items()
        return {names.module(n): names.module(r.of) for n, r in said if r.of is not None}
    source, tied = input_embeddings(model), tied_by_peft(model)
    own = {names.module(name): rows.ids for name, rows in folder.rows.items()}
    ids = own.get(source) if source is not None else None
    if source is None or ids is None:
        return {}
    # where it is told of other rows in one of them PEFT ties none
    said = [rows for name, rows in folder.tied_rows.items() if any(p.endswith(name) for p in tied)]
    said += [own[path] for path in tied if path in own]
    return dict.fromkeys(tied, source) if all(rows == ids for rows in said) else {}


def make_room(model: nn.Module, folder: AdapterFolder) -> None:
    """Resize a base's embeddings where an adapter has all the rows that this adds.

    Where it lacks some the base is left as it is, and the load says so.

    Args:
        model: A base that was just loaded, for this adapter.
        folder: The adapter.
    """
    now = vocabulary(model)
    if not folder.rows or not is_pretrained(model) or now is None:
        return
    content = (folder.header or {}).get("fingerprint")
    then = from_json(content) if isinstance(content, dict) else None
    highest = 1 + max(max(rows.ids) for rows in folder.rows.values())
    wanted = max(highest, (then and then.vocabulary) or 0)
    paths = {path for path, _ in model.named_modules()}
    names = rename(folder.rows, (), paths, model)
    tied = _tied(folder, model, names)
    own = {names.module(name): set(rows.ids) for name, rows in folder.rows.items()}
    has = own | {path: own[of] for path, of in tied.items() if of in own}
    added = set(range(now, wanted))
    if added and all(added <= rows for rows in _of_ends(model, has)):
        model.resize_token_embeddings(wanted, mean_resizing=False)  # type: ignore[operator]


def _of_ends(model: nn.Module, rows: Mapping[str, set[int]]) -> Iterator[set[int]]:
    """Yield the rows that an adapter has of the input embeddings, and of the output head."""
    paths = {module: path for path, module in model.named_modules()}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        end = embedding(model, getter)
        if end is not None:
            yield rows.get(paths.get(end, ""), set())
