"""What somebody unfroze beside an adapter trains, and is saved with it or stops by name."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import nn

import hf_lora
from hf_lora import StateError
from tests.model.models import TOKENS, llama
from tests.snapshot import snapshot
from tests.tiny import Net, answers

ROWS = [{"input_ids": TOKENS[i % 2], "labels": TOKENS[i % 2]} for i in range(8)]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def unfreeze(model: nn.Module, *words: str) -> None:
    for name, parameter in model.named_parameters():
        if any(word in name for word in words):
            parameter.requires_grad_(True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        model(TOKENS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("words", [("norm",), ("lm_head",), ("up_proj", "embed_tokens")])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_loop_saves_what_it_trained_and_goes_on(
    tmp_path: Path, words: tuple[str, ...], tied: bool
):
    model = hf_lora.wrap(llama(tied=tied), ["q_proj"], r=2)
    unfreeze(model, *words)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for folder in ("first", "second"):  # the optimizer's tensors are still those that train
        before = logits(model)
        step(model, optimizer)
        assert not torch.equal(logits(model), before)
        model.save_pretrained(tmp_path / folder)
        again = hf_lora.load(llama(tied=tied), tmp_path / folder)
        assert torch.equal(logits(again), logits(model))
    theirs = PeftModel.from_pretrained(llama(tied=tied), tmp_path / "second")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)


def run(folder: Path, steps: int, resume: bool = False) -> tuple[nn.Module, hf.Trainer]:
    model = hf_lora.wrap(llama(), ["q_proj"], r=2)
    unfreeze(model, "norm")
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=ROWS)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_a_trainer_saves_it_resumes_it_and_leaves_the_base_alone(tmp_path: Path):
    base = logits(llama())
    through, _ = run(tmp_path / "through", 4)
    run(tmp_path / "resumed", 2)
    resumed, _ = run(tmp_path / "resumed", 4, resume=True)
    assert torch.equal(logits(resumed), logits(through))
    again = hf_lora.load(llama(), tmp_path / "through" / "checkpoint-4")
    assert torch.equal(logits(again), logits(through))
    with hf_lora.no_adapter(through):
        assert torch.equal(logits(through), base)
    assert "model.norm" in hf_lora.summary(through).adapters[0].trained


def test_unwrapping_gives_the_base_back(tmp_path: Path):
    model = llama()
    before, objects = snapshot(model), dict(model.named_parameters())
    hf_lora.wrap(model, ["q_proj"], r=2)
    unfreeze(model, "norm")
    hf_lora.save(model, tmp_path)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    step(model, optimizer)
    hf_lora.unwrap(model)
    assert snapshot(model).parameters == before.parameters
    assert all(p is objects[name] for name, p in model.named_parameters())


class WithOwn(Net):
    """A model with a parameter of its own beside its layers."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("q_proj.bias", r"layers\.0\.q_proj\.bias: its layer has a low-rank update"),
        ("shift", "shift: it belongs to the model itself"),
    ],
)
def test_what_no_file_can_hold_stops_by_name_and_changes_nothing(
    tmp_path: Path, word: str, named: str
):
    model = hf_lora.wrap(WithOwn(), ["q_proj"], r=2)
    unfreeze(model, word, "norm")
    before, want = snapshot(model), answers(model)
    with pytest.raises(StateError, match=named):
        hf_lora.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert snapshot(model) == before
    assert torch.equal(answers(model), want)
    arguments = hf.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(StateError, match=named):
        hf.Trainer(model=model, args=arguments, train_dataset=ROWS).train()  # type: ignore[arg-type]


def test_a_flag_from_before_the_wrap_trains_nothing_and_is_there_again_afterwards():
    """What is to train beside the adapter is named, or unfrozen after the wrap."""
    model = llama()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    hf_lora.wrap(model, ["q_proj"], r=2)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains
    assert all("lora_" in name for name in trains)
    hf_lora.unwrap(model)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains == ["model.norm.weight"]
