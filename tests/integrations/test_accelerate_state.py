"""States that `register(accelerator)` saves: refused unless they are whole, as Trainer's are."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, set_seed

import hf_lora
from hf_lora.errors import AdapterFileError, HfLoRAWarning
from hf_lora.files.manifest import MANIFEST_FILE
from tests.integrations import training
from tests.integrations.training import adapter_tensors, same

IDS = torch.tensor([row["input_ids"] for row in training.tokens(4)])
NUMBERED = {"automatic_checkpoint_naming": True}


class Loop:
    """An accelerator, a wrapped model with dropout, an optimizer and a schedule."""

    def __init__(self, seed: int, folder: Path, **project: Any):
        AcceleratorState._reset_state(reset_partial_state=True)
        project_config = ProjectConfiguration(str(folder), **project)
        self.accelerator = Accelerator(cpu=True, project_config=project_config)
        hf_lora.register(self.accelerator)
        set_seed(seed)
        model = training.wrapped(seed=seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(
            model, optimizer, schedule
        )

    def step(self) -> None:
        self.model.train()
        self.accelerator.backward(self.model(input_ids=IDS, labels=IDS).loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


@pytest.fixture(autouse=True)
def states() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    random.seed(0)


def ended(folder: Path, **project: Any) -> dict[str, torch.Tensor]:
    """Two steps, each saved, and what a third one leads to."""
    loop = Loop(1, folder, **project)
    for number in range(2):
        loop.step()
        loop.accelerator.save_state(None if project else str(folder / f"state-{number}"))
    loop.step()
    return adapter_tensors(loop.model)


def lose(name: str) -> Callable[[Path], None]:
    return lambda state: (state / name).unlink()


def flip(name: str) -> Callable[[Path], None]:
    def harm(state: Path) -> None:
        content = bytearray((state / name).read_bytes())
        content[len(content) // 2] ^= 1
        (state / name).write_bytes(content)

    return harm


PARTS = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "adapter_model.safetensors")
HARM = {f"{do.__name__} {name}": do(name) for do in (lose, flip) for name in PARTS}


@pytest.mark.parametrize("harm", HARM)
def test_a_state_that_is_not_whole_is_refused(tmp_path: Path, harm: str):
    ended(tmp_path)
    HARM[harm](tmp_path / "state-1")
    loop = Loop(5, tmp_path)
    before = adapter_tensors(loop.model)
    with pytest.raises(AdapterFileError, match=r"(?s)state-1 is not whole.*" + harm.split()[1]):
        loop.accelerator.load_state(str(tmp_path / "state-1"))
    assert same(adapter_tensors(loop.model), before)


def test_a_whole_one_goes_on_to_the_bit(tmp_path: Path):
    want = ended(tmp_path)
    loop = Loop(5, tmp_path)
    loop.accelerator.load_state(str(tmp_path / "state-1"))
    loop.step()
    assert same(adapter_tensors(loop.model), want)


def test_of_numbered_ones_the_newest_whole_is_taken(tmp_path: Path):
    ended(tmp_path, **NUMBERED)
    states = tmp_path / "checkpoints"
    first = Loop(5, tmp_path, **NUMBERED)
    first.accelerator.load_state(str(states / "checkpoint_0"))
    (states / "checkpoint_1" / "optimizer.bin").unlink()
    loop = Loop(5, tmp_path, **NUMBERED)
    with pytest.warns(HfLoRAWarning, match=r"(?s)from .*checkpoint_0; newer.*checkpoint_1: "):
        loop.accelerator.load_state()
    assert same(adapter_tensors(loop.model), adapter_tensors(first.model))


def test_a_state_saved_over_another_and_cut_short_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loop = Loop(1, tmp_path)
    loop.step()
    loop.accelerator.save_state(str(tmp_path / "state"))
    loop.step()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("accelerate.accelerator.save_accelerator_state", broken)
    with pytest.raises(KeyboardInterrupt):
        loop.accelerator.save_state(str(tmp_path / "state"))
    with pytest.raises(AdapterFileError, match="its save was cut short"):
        loop.accelerator.load_state(str(tmp_path / "state"))


def test_nothing_but_half_a_state_is_an_error(tmp_path: Path):
    half = tmp_path / "checkpoints" / "checkpoint_0"
    half.mkdir(parents=True)
    loop = Loop(1, tmp_path, **NUMBERED)
    with (
        pytest.warns(HfLoRAWarning, match="no checkpoint in .* was saved to its end"),
        pytest.raises(AdapterFileError, match="holds no state that was saved to its end"),
    ):
        loop.accelerator.load_state()


def test_a_state_of_an_older_version_is_judged_by_what_is_there(tmp_path: Path):
    want = ended(tmp_path)
    (tmp_path / "state-1" / MANIFEST_FILE).unlink()
    loop = Loop(5, tmp_path)
    loop.accelerator.load_state(str(tmp_path / "state-1"))
    loop.step()
    assert same(adapter_tensors(loop.model), want)
    lose("random_states_0.pkl")(tmp_path / "state-1")
    with pytest.raises(AdapterFileError, match=r"random_states_0.pkl.*is missing"):
        loop.accelerator.load_state(str(tmp_path / "state-1"))


def test_other_models_get_no_manifest(tmp_path: Path):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    hf_lora.register(accelerator)
    accelerator.prepare(torch.nn.Linear(2, 2))
    accelerator.save_state(str(tmp_path))
    assert not (tmp_path / MANIFEST_FILE).exists()


def test_the_manifest_lists_every_part(tmp_path: Path):
    ended(tmp_path)
    found = json.loads((tmp_path / "state-0" / MANIFEST_FILE).read_text())
    assert set(found["parts"]) == set(PARTS)
