"""A fresh head is part of its adapter: trained, saved, and back with nothing said again."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors import safe_open
from torch import nn

import hf_lora
from hf_lora import AdapterFileError, AdapterMismatchError, HfLoRAWarning
from hf_lora.files.header import HEADER_KEY
from tests.files.edit import read_tensors, write_tensors

TEXT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
TOKENS = torch.arange(1, 13).view(2, 6)
NAMES = {0: "bad", 1: "so so", 2: "good"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(5)
    hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).save_pretrained(folder / "llama")
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(folder / "bert")
    hf.RobertaModel(hf.RobertaConfig(**TEXT)).save_pretrained(folder / "roberta")
    return folder


def fresh(folder: Path, seed: int = 1, task: str = "SequenceClassification", **fields) -> nn.Module:
    """Load a base as a classifier, with a head of its own each time."""
    torch.manual_seed(seed)
    return getattr(hf, f"AutoModelFor{task}").from_pretrained(folder, **fields).eval()


def trained(model: nn.Module, targets: list[str], **fields) -> nn.Module:
    """Wrap a model and take a step with everything that trains."""
    hf_lora.wrap(model, targets, r=2, **fields)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(TOKENS).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def answers(model: nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits


CASES = {
    "llama": ("llama", "SequenceClassification", ["q_proj", "v_proj"]),
    "bert": ("bert", "SequenceClassification", ["query", "value"]),
    "a head in parts": ("roberta", "SequenceClassification", ["query", "value"]),
    "tokens": ("bert", "TokenClassification", ["query", "value"]),
}


@pytest.mark.parametrize(("base", "task", "targets"), CASES.values(), ids=CASES.keys())
def test_a_head_comes_back_with_its_labels_and_peft_reads_it(
    bases: Path, tmp_path: Path, base: str, task: str, targets: list[str]
):
    labels = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    model = trained(fresh(bases / base, task=task, **labels), targets)
    want = answers(model)
    model.save_pretrained(tmp_path)

    torch.manual_seed(2)
    again = hf_lora.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.id2label == NAMES
    assert again.config.label2id == labels["label2id"]
    assert torch.equal(answers(again), want)
    onto = hf_lora.load(fresh(bases / base, 3, task, num_labels=3), tmp_path)
    assert torch.equal(answers(onto), want)
    theirs = PeftModel.from_pretrained(fresh(bases / base, 4, task, num_labels=3), tmp_path)
    torch.testing.assert_close(answers(theirs), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_base_has_a_head_of_32_bits_and_every_reader_computes_the_same(
    bases: Path, tmp_path: Path, dtype: str
):
    model = trained(fresh(bases / "bert", dtype=dtype, num_labels=3), ["query"])
    want = answers(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        key = "base_model.model.classifier.weight"
        assert file.get_tensor(key).dtype == torch.float32
    again = hf_lora.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(answers(again), want)
    theirs = PeftModel.from_pretrained(
        fresh(bases / "bert", 4, dtype=dtype, num_labels=3), tmp_path
    )
    assert torch.equal(answers(theirs), want)


def test_one_label_and_what_it_is_for_come_back(bases: Path, tmp_path: Path):
    model = fresh(bases / "bert", num_labels=1, problem_type="regression")
    trained(model, ["query"]).save_pretrained(tmp_path)
    again = hf_lora.from_pretrained(tmp_path)
    assert (again.config.num_labels, again.config.problem_type) == (1, "regression")
    assert torch.equal(answers(again), answers(model))


def test_what_is_said_of_labels_counts(bases: Path, tmp_path: Path):
    trained(fresh(bases / "bert", id2label=NAMES), ["query"]).save_pretrained(tmp_path)
    same = hf_lora.from_pretrained(tmp_path, num_labels=3)
    assert same.config.id2label == NAMES
    other = {0: "a", 1: "b", 2: "c"}
    assert hf_lora.from_pretrained(tmp_path, id2label=other).config.id2label == other
    with pytest.raises(AdapterMismatchError, match=r"classifier\.weight"):
        hf_lora.from_pretrained(tmp_path, num_labels=4)


def test_the_number_of_labels_in_a_file_of_pefts_is_that_of_its_head(bases: Path, tmp_path: Path):
    trained(fresh(bases / "bert", num_labels=5), ["query"]).save_pretrained(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(fresh(bases / "bert", num_labels=5), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = hf_lora.from_pretrained(tmp_path / "theirs")
    assert again.config.num_labels == 5
    assert torch.equal(answers(again), answers(theirs))


def test_a_language_model_has_no_labels(bases: Path, tmp_path: Path):
    model = fresh(bases / "llama", task="CausalLM")
    trained(model, ["q_proj"]).save_pretrained(tmp_path)
    again = hf_lora.from_pretrained(tmp_path)
    assert again.config.id2label == model.config.id2label


@pytest.mark.parametrize(
    "entry",
    [
        ["bad", "good"],
        {"id2label": ["bad", "good"]},
        {"id2label": {"0": "bad", "2": "good"}},
        {"id2label": {"0": "bad", "1": 1}},
        {"id2label": {str(i): f"{i}" for i in range(100_000)}},
    ],
    ids=["a list", "a list inside", "a gap", "a number", "more than the head has"],
)
def test_labels_that_cannot_be_are_refused(bases: Path, tmp_path: Path, entry):
    trained(fresh(bases / "bert", num_labels=2), ["query"]).save_pretrained(tmp_path)

    tensors, metadata = read_tensors(tmp_path)
    header = {**json.loads(metadata[HEADER_KEY]), "labels": entry}
    write_tensors(tmp_path, tensors, {"format": "pt", HEADER_KEY: json.dumps(header)})
    with pytest.raises(AdapterFileError, match="labels"):
        hf_lora.from_pretrained(tmp_path)


def test_a_head_that_nobody_trained_is_told_when_the_adapter_is_loaded(bases: Path, tmp_path: Path):
    trained(fresh(bases / "bert"), ["query"], train=()).save_pretrained(tmp_path)
    with pytest.warns(HfLoRAWarning, match="classifier is neither in the base's checkpoint nor"):
        hf_lora.load(fresh(bases / "bert"), tmp_path)


def test_the_trainer_ends_with_a_head_that_comes_back(bases: Path, tmp_path: Path):
    """Checkpoints hold it, a resume takes it up, and the plain twin of it is the same run."""
    rows = [{"input_ids": TOKENS[i % 2], "labels": torch.tensor(i % 3)} for i in range(8)]

    def run(folder: Path, steps: int, resume: bool = False) -> nn.Module:
        model = hf_lora.wrap(fresh(bases / "bert", num_labels=3), ["query"], r=2)
        arguments = hf.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            save_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        hf.Trainer(model=model, args=arguments, train_dataset=rows).train(
            resume_from_checkpoint=resume
        )
        return model

    through = run(tmp_path / "through", 4)
    run(tmp_path / "resumed", 2)
    resumed = run(tmp_path / "resumed", 4, resume=True)
    assert torch.equal(answers(resumed), answers(through))
    again = hf_lora.from_pretrained(tmp_path / "through" / "checkpoint-4")
    assert torch.equal(answers(again), answers(through))
