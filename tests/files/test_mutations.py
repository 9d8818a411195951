"""Mutated adapter folders: each is refused by name, or loads with the outputs it had.

200 of them here, and 2,000 others, of other seeds, in the ring that tries every case.

What no reader can know is left out: other numbers in a PEFT file (its data, its lora_alpha) make
another sound adapter. Ours carry a digest, so in them every byte counts.
"""

import copy
import dataclasses
import json
import random
import string
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import hf_lora
from hf_lora.files.safetensors_io import serialize
from hf_lora.model.registry import registry_of
from tests import tiny
from tests.files import edit
from tests.files.refusing import files_in
from tests.oracle.tree import Tree
from tests.work import calls

Mutation = Callable[[Path, random.Random], None]

SOUND_OTHERWISE = ("lora_alpha", "alpha_pattern", "use_rslora")
"""Fields of which another value makes another adapter that is as sound."""


def plain_ours(folder: Path) -> None:
    tiny.saved(folder)


def rich_ours(folder: Path) -> None:
    overrides = {"v_proj": {"r": 3, "alpha": 7.0, "dropout": 0.1}}
    tiny.saved(folder, overrides=overrides, train=["head"], rslora=True, dropout=0.2)


def plain_pefts(folder: Path) -> None:
    save_pefts(folder, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def rich_pefts(folder: Path) -> None:
    config = peft.LoraConfig(
        r=2,
        target_modules=r"layers\.\d\.(q|v)_proj",
        rank_pattern={"v_proj": 3},
        alpha_pattern={r"layers\.0\.q_proj": 5},
        modules_to_save=["head"],
        use_rslora=True,
    )
    save_pefts(folder, config)


def save_pefts(folder: Path, config: peft.LoraConfig) -> None:
    model = peft.get_peft_model(tiny.Net(), config)
    tiny.scramble(model)
    model.save_pretrained(folder)


# Bytes.


def flip(path: Path, begin: int, end: int, random_: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(random_.randint(1, 4)):
        content[random_.randrange(begin, min(end, len(content)))] ^= 1 << random_.randrange(8)
    path.write_bytes(content)


def flip_header(folder: Path, random_: random.Random) -> None:
    data = edit.read_header(folder)[1]
    path = folder / edit.WEIGHTS
    flip(path, 0, path.stat().st_size - len(data), random_)


def flip_anything(folder: Path, random_: random.Random) -> None:
    flip(folder / random_.choice([edit.WEIGHTS, edit.CONFIG]), 0, 10**9, random_)


def truncate(folder: Path, random_: random.Random) -> None:
    path = folder / random_.choice([edit.WEIGHTS, edit.CONFIG])
    path.write_bytes(path.read_bytes()[: random_.randrange(path.stat().st_size)])


def splice(folder: Path, random_: random.Random) -> None:
    """Take a piece out, put one in, or repeat one."""
    path = folder / random_.choice([edit.WEIGHTS, edit.CONFIG])
    content = path.read_bytes()
    at, size = random_.randrange(len(content)), random_.randint(1, 40)
    piece = random_.choice([b"", random_.randbytes(size), content[at : at + size] * 2])
    path.write_bytes(content[:at] + piece + content[at + size :])


# Fields.


def wild(random_: random.Random, like: Any) -> Any:
    """Return a value that a field of this value might hold by mistake or by malice."""
    values: list[Any] = [
        *(None, True, False, 0, 1, 2, 3, -1, 7, 2.5, 1e308, float("nan"), 10**30, "", "q_proj"),
        *([], {}, ["q_proj"], {"q_proj": 1}, [None], "(", ".*", "layers", "../x", "\ud800"),
    ]
    if isinstance(like, str):
        values += [like[1:], like + "x", like.upper()]
    if isinstance(like, (list, dict)) and like:
        values += [like.__class__(list(like.items())[1:] if isinstance(like, dict) else like[1:])]
    if isinstance(like, (int, float)) and not isinstance(like, bool):
        values += [like + 1, like * 2, -like, str(like)]
    return random_.choice([value for value in values if repr(value) != repr(like)])


def change_leaf(tree: Any, random_: random.Random) -> Any:
    """Return a copy of JSON data with one thing in it changed, taken away or added."""
    tree = copy.deepcopy(tree)
    place = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = random_.choice(keys)
        inside = place[key]
        if isinstance(inside, (dict, list)) and inside and random_.random() < 0.8:
            place = inside
            continue
        what = random_.random()
        if what < 0.15:
            del place[key]
        elif what < 0.25 and isinstance(place, dict):
            place["".join(random_.choices(string.ascii_lowercase, k=5))] = inside
        else:
            place[key] = wild(random_, inside)
        return tree


def change_json(folder: Path, random_: random.Random) -> None:
    edit.write_config(folder, change_leaf(edit.read_config(folder), random_))


def change_json_of_pefts(folder: Path, random_: random.Random) -> None:
    """Change what can be told from a sound file; see the top."""
    config = edit.read_config(folder)
    fixed = {name: config.pop(name) for name in SOUND_OTHERWISE}
    edit.write_config(folder, change_leaf(config, random_) | fixed)


def change_entries(folder: Path, random_: random.Random) -> None:
    """Change a field of the safetensors header: a name, a type, a shape, an offset."""
    header, data = edit.read_header(folder)
    metadata = header.pop("__metadata__", {})
    edit.write_header(folder, {"__metadata__": metadata, **change_leaf(header, random_)}, data)


def change_our_header(folder: Path, random_: random.Random) -> None:
    """Change our part of the header and seal it again, so that only its sense can be judged."""
    tensors, metadata = edit.read_tensors(folder)
    changed = change_leaf(json.loads(metadata["hf_lora"]), random_)
    seal(folder, tensors, {**metadata, "hf_lora": json.dumps(changed)})


def change_both(folder: Path, random_: random.Random) -> None:
    """Change a number in the JSON and in our header alike, without a new digest."""
    header, data = edit.read_header(folder)
    ours = json.loads(header["__metadata__"]["hf_lora"])
    factor = random_.choice([2, 3, 0.5])
    config = edit.read_config(folder)
    config["lora_alpha"] *= factor
    patterns = config.get("alpha_pattern", {})
    config["alpha_pattern"] = {name: v * factor for name, v in patterns.items()}
    for slot in ours["slots"].values():
        slot["alpha"] *= factor
    ours["adapter_config"] = config
    ours["config"]["alpha"] *= factor
    header["__metadata__"]["hf_lora"] = json.dumps(ours)
    edit.write_config(folder, config)
    edit.write_header(folder, header, data)


def drop_metadata(folder: Path, random_: random.Random) -> None:
    """Take something of ours out of the header."""
    tensors, metadata = edit.read_tensors(folder)
    del metadata[random_.choice(sorted(metadata))]
    edit.write_tensors(folder, tensors, metadata)


# Tensors.


def seal(folder: Path, tensors: edit.Tensors, metadata: dict[str, str]) -> None:
    with open(folder / edit.WEIGHTS, "wb") as file:
        serialize(tensors, metadata)(file)


def change_a_tensor(folder: Path, random_: random.Random) -> None:
    """Remove, rename, add, exchange, reshape or retype a tensor, and seal the file again."""
    tensors, metadata = edit.read_tensors(folder)
    key = random_.choice(sorted(tensors))
    tensor = tensors[key]
    what = random_.randrange(8)
    if what == 0:
        del tensors[key]
    elif what == 1:
        at = random_.randrange(len(key))
        tensors[key[:at] + random_.choice("aX_.0") + key[at + 1 :]] = tensors.pop(key)
    elif what == 2:
        tensors[random_.choice([f"{key}.x", f"x.{key}", "x", f"module.{key}"])] = tensor.clone()
    elif what == 3:
        shapes = [(), (0,), (1,), (3, 8), (8, 3), (2, 8, 1)]
        tensors[key] = torch.zeros(random_.choice([s for s in shapes if s != tensor.shape]))
    elif what == 4:
        tensors[key] = tensor.to(
            random_.choice([torch.int32, torch.uint8, torch.bool, torch.complex64])
        )
    elif what == 5:
        tensor.view(-1)[random_.randrange(tensor.numel())] = float(
            random_.choice(["nan", "inf", "-inf"])
        )
    elif what == 6:
        tensors[key] = tensor[:-1].clone() if random_.random() < 0.5 else tensor[..., :-1].clone()
    else:
        tensors[key] = tensor.reshape(-1).clone()
    seal(folder, tensors, metadata)


def swap_weights(folder: Path, random_: random.Random) -> None:
    """Put the weights of another adapter beside this JSON; ranks or layers differ."""
    other = random_.choice([{"r": 4}, {"r": 1, "targets": ["q_proj"]}, {"targets": "v_proj"}])
    tiny.saved(folder.with_name("other"), seed=8, **other)
    (folder.with_name("other") / edit.WEIGHTS).replace(folder / edit.WEIGHTS)


def swap_json(folder: Path, random_: random.Random) -> None:
    """Put the JSON of another adapter beside these weights."""
    other = random_.choice([{"r": 4}, {"r": 1, "targets": ["q_proj"]}, {"targets": "v_proj"}])
    tiny.saved(folder.with_name("other"), seed=8, **other)
    (folder.with_name("other") / edit.CONFIG).replace(folder / edit.CONFIG)


def exchange_names(folder: Path, random_: random.Random) -> None:
    """Let two files stand under each other's names."""
    weights, config = folder / edit.WEIGHTS, folder / edit.CONFIG
    content = weights.read_bytes()
    weights.write_bytes(config.read_bytes())
    config.write_bytes(content)


ON_ANY = [
    flip_header,
    truncate,
    splice,
    change_entries,
    change_a_tensor,
    change_a_tensor,
    change_a_tensor,
    swap_weights,
    swap_json,
    exchange_names,
]
ON_OURS = [
    *ON_ANY,
    flip_anything,
    flip_anything,
    change_json,
    change_json,
    change_json,
    change_our_header,
    change_our_header,
    change_our_header,
    change_both,
    drop_metadata,
]
# A splice may cut digits out of lora_alpha; see the top.
ON_PEFTS = [*(set(ON_ANY) - {splice}), *[change_json_of_pefts] * 5]
ON_PEFTS.sort(key=lambda mutation: mutation.__name__)

COUNTS = {plain_ours: 60, rich_ours: 60, plain_pefts: 40, rich_pefts: 40}
"""How many mutations of each folder one seed stands for."""

SEED = 11
OTHER_SEEDS = range(100, 110)

CALLS = 50_000
"""Of functions: what a load may do, whatever has been made of the file. As it was it has 12,000."""


def outcome(folder: Path, expected: torch.Tensor) -> str | None:
    """Load a mutated folder; return the message of a refusal, or None if it loads as it was."""
    model = tiny.Net()
    tree, files = Tree.of(model), files_in(folder)

    refusal = None

    def load() -> None:
        nonlocal refusal
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hf_lora.HfLoRAWarning)
                hf_lora.load(model, folder)
        except hf_lora.HfLoRAError as error:
            refusal = str(error)

    assert calls(load) < CALLS
    assert files_in(folder) == files
    if refusal is not None:
        assert Tree.of(model) == tree
        assert tree.same_values(model)
        # the folder or the file in it, and what is wrong with it
        assert refusal.startswith(str(folder))
        assert len(refusal) > len(str(folder)) + 20
        assert refusal.replace("\n", "").isprintable()
        return refusal
    assert torch.equal(tiny.answers(model), expected)
    # what loads can be saved, and loads again as it was
    hf_lora.save(model, folder.with_name("again"))
    again = hf_lora.load(tiny.Net(), folder.with_name("again"))
    assert torch.equal(tiny.answers(again), expected)
    assert_same_adapter(again, model)
    assert tree.same_values(hf_lora.unwrap(model))
    return None


def assert_same_adapter(model: nn.Module, other: nn.Module) -> None:
    """Compare everything that a file holds of an adapter: numbers, tensors, configuration."""
    adapter, wanted = (registry_of(each).adapter("default") for each in (model, other))
    # where a file came from is told anew by the model that is saved
    assert dataclasses.replace(adapter, origin=wanted.origin) == wanted
    tensors, want = (
        {(path, role): tensor for path, _, role, tensor in registry_of(each).tensors("default")}
        for each in (model, other)
    )
    assert tensors.keys() == want.keys()
    for place, tensor in tensors.items():
        assert tensor.dtype == want[place].dtype
        assert torch.equal(tensor, want[place])


def attempt(folder: Path, seed: int) -> tuple[list[str], list[str]]:
    """Mutate and load; return the messages of the refusals, and the names of what loaded."""
    random_ = random.Random(seed)
    refused, loaded = [], []
    for write, count in COUNTS.items():
        kind = write.__name__
        write(folder / kind)
        expected = tiny.answers(hf_lora.load(tiny.Net(), folder / kind))
        mutations = ON_OURS if write in (plain_ours, rich_ours) else ON_PEFTS
        for number in range(count):
            mutation = mutations[number % len(mutations)]
            mutated = folder / f"{kind}{number}" / "adapter"
            mutated.mkdir(parents=True)
            for name, content in files_in(folder / kind).items():
                (mutated / name).write_bytes(content)
            mutation(mutated, random_)
            try:
                message = outcome(mutated, expected)
            except BaseException as error:
                error.add_note(f"{mutation.__name__} {number} of {kind}, in {mutated}")
                raise
            if message is None:
                loaded.append(f"{mutation.__name__} of {kind}")
            else:
                refused.append(message)
    return refused, loaded


def check(folder: Path, seed: int) -> None:
    refused, loaded = attempt(folder, seed)
    print(f"{len(refused)} refused, {len(loaded)} loaded with equal outputs")
    assert len(refused) + len(loaded) == sum(COUNTS.values())
    # most mutations hurt, and what is harmless is not refused for nothing
    assert len(refused) >= 140
    assert len(loaded) >= 10


def test_two_hundred_mutations(tmp_path: Path):
    check(tmp_path, SEED)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", OTHER_SEEDS)
def test_two_thousand_others(tmp_path: Path, seed: int):
    check(tmp_path, seed)


@pytest.mark.parametrize("write", COUNTS, ids=lambda write: write.__name__)
def test_without_a_mutation_they_all_load(tmp_path: Path, write: Callable[[Path], None]):
    write(tmp_path)
    model = hf_lora.load(tiny.Net(), tmp_path)
    assert not torch.allclose(tiny.answers(model), tiny.answers(tiny.Net()))
