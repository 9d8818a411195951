"""A training that went to nan is told, and never written over what was good."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator

import hf_lora
from hf_lora import GradientError, SaveError
from tests.model.models import TOKENS, llama
from tests.tiny import adapted, answers

ROWS = [{"input_ids": TOKENS[i % 2], "labels": TOKENS[i % 2]} for i in range(8)]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Broken(hf.Trainer):
    """Its loss is no number from the third step on."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        return loss * (float("nan") if self.state.global_step >= 2 else 1.0)


def run(folder: Path, **fields: Any) -> hf.Trainer:
    arguments = {"logging_steps": 100, "save_strategy": "no", "max_steps": 4} | fields
    args = hf.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    model = hf_lora.wrap(llama(), ["q_proj"], r=2)
    return Broken(model=model, args=args, train_dataset=ROWS)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("trained", [(), ["head"]])
def test_a_save_leaves_the_older_files(tmp_path: Path, value: float, trained: list[str]):
    model = adapted(train=trained)
    hf_lora.save(model, tmp_path)
    before, want = contents(tmp_path), answers(model)
    last = [p for p in model.parameters() if p.requires_grad][-1]
    with torch.no_grad():
        last.view(-1)[-1] = value
    with pytest.raises(SaveError, match="not finite"):
        hf_lora.save(model, tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(SaveError, match="not finite"):
        hf_lora.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert torch.equal(answers(hf_lora.load(type(model)(), tmp_path)), want)


def test_a_number_that_the_type_on_disk_cannot_hold_is_told(tmp_path: Path):
    model = adapted()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(1e5)
    with pytest.raises(SaveError, match=r"or not in torch\.float16"):
        hf_lora.save(model, tmp_path, dtype="float16")
    hf_lora.save(model, tmp_path, dtype="bfloat16")


def test_one_bad_adapter_of_two_keeps_both_from_being_written(tmp_path: Path):
    model = adapted()
    hf_lora.add_adapter(model, "b", "q_proj", r=2)
    hf_lora.save(model, tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        dict(model.named_parameters())["layers.0.q_proj.lora_A_b"].fill_(float("nan"))
    with pytest.raises(SaveError, match="'b' holds numbers that are not finite"):
        hf_lora.save(model, tmp_path)
    assert contents(tmp_path) == before


def test_a_trainer_stops_at_its_next_log(tmp_path: Path):
    trainer = run(tmp_path, logging_steps=1)
    with pytest.raises(GradientError, match="no longer finite"):
        trainer.train()
    assert trainer.state.global_step == 3


def test_a_trainer_stops_at_its_next_save_and_leaves_no_empty_checkpoint(tmp_path: Path):
    trainer = run(tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises(GradientError, match="no longer finite"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    hf_lora.load(llama(), tmp_path / "checkpoint-2")


def test_a_trainer_that_neither_logs_nor_saves_stops_at_its_end(tmp_path: Path):
    with pytest.raises(GradientError, match="no longer finite"):
        run(tmp_path).train()


def test_a_loop_with_accelerate_is_stopped_when_it_saves(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    hf_lora.register(accelerator)
    model = hf_lora.wrap(llama(), ["q_proj"], r=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.save_state(str(tmp_path))
    before = contents(tmp_path)
    loss = prepared(input_ids=TOKENS, labels=TOKENS).loss * float("nan")
    accelerator.backward(loss)
    optimizer.step()
    with pytest.raises(SaveError, match="not finite"):
        accelerator.save_state(str(tmp_path))
    kept = {name: data for name, data in before.items() if name.startswith("adapter")}
    assert {name: data for name, data in contents(tmp_path).items() if name in kept} == kept
