"""sentence-transformers' models and trainers: adapters saved, resumed, loaded as the best."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    losses,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Router, Transformer
from transformers import BertConfig, BertForSequenceClassification, BertModel

import hf_lora
from hf_lora.errors import AdapterFileError, GradientError, HfLoRAWarning
from hf_lora.files.manifest import MANIFEST_FILE
from hf_lora.integrations.in_front import is_in_front
from hf_lora.integrations.sentence_models import is_sentence_model
from hf_lora.integrations.trainer import patch as trainer_patch
from hf_lora.model.registry import find
from tests.integrations import training
from tests.integrations.training import adapter_tensors, base_tensors, same

TEXTS = ["the cat sat", "a big dog ran on the mat", "mat"]
PAIRS = {
    "sentence1": ["the cat sat", "a dog ran", "big mat", "on the mat"] * 4,
    "sentence2": ["cat", "the big dog ran", "mat", "sat on the mat"] * 4,
}
FIELDS = {"targets": ["query", "value"], "r": 4}


@dataclasses.dataclass
class Kind:
    """One class of models, and how it is built, trained and asked."""

    build: Callable[[Path], Any]
    trainer: Callable[..., Any]
    answers: Callable[[Any], torch.Tensor]
    reload: Callable[[Path], Any]
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_bert(folder: Path, cls: Any, **config: Any) -> Path:
    if not folder.exists():
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        with training.seeded(0):
            fields = {"vocab_size": len(training.WORDS), "num_hidden_layers": 2, **sizes, **config}
            cls(BertConfig(**fields)).save_pretrained(folder)
        training.tokenizer().save_pretrained(folder)
    return folder


def bi_encoder(folder: Path) -> Any:
    """With a layer after the pooling, which trains in full and saves itself."""
    base = Transformer(str(save_bert(folder / "bert", BertModel)))
    with training.seeded(3):
        return SentenceTransformer(modules=[base, Pooling(32), Dense(32, 16)], device="cpu")


def cross_encoder(folder: Path) -> Any:
    base = save_bert(folder / "classifier", BertForSequenceClassification, num_labels=1)
    return CrossEncoder(str(base), device="cpu")


def arguments(cls: Any, folder: Path, fields: dict[str, Any]) -> Any:
    usual = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
    }
    training.speed_up_collection()
    return cls(**{**usual, **fields})


def bi_trainer(model: Any, folder: Path, **fields: Any) -> Any:
    data = Dataset.from_dict(PAIRS)
    return SentenceTransformerTrainer(
        model=model,
        args=arguments(SentenceTransformerTrainingArguments, folder, fields),
        train_dataset=data,
        eval_dataset=data,
        loss=losses.MultipleNegativesRankingLoss(model),
    )


def cross_trainer(model: Any, folder: Path, **fields: Any) -> Any:
    data = Dataset.from_dict({**PAIRS, "label": [1.0, 0.0] * 8})
    return CrossEncoderTrainer(
        model=model,
        args=arguments(CrossEncoderTrainingArguments, folder, fields),
        train_dataset=data,
        eval_dataset=data,
        loss=BinaryCrossEntropyLoss(model),
    )


BI = Kind(
    bi_encoder,
    bi_trainer,
    lambda model: model.encode(TEXTS, convert_to_tensor=True),
    lambda folder: SentenceTransformer(str(folder), device="cpu"),
)
CROSS = Kind(
    cross_encoder,
    cross_trainer,
    lambda model: model.predict([("the cat", text) for text in TEXTS], convert_to_tensor=True),
    lambda folder: CrossEncoder(str(folder), device="cpu"),
    {"train": ["classifier"]},
)


@pytest.fixture(params=[BI, CROSS], ids=["bi-encoder", "cross-encoder"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Both classes that people train."""
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bases are."""
    return tmp_path_factory.mktemp("bases")


def wrapped(kind: Kind, folder: Path, seed: int = 1, whole: bool = True) -> Any:
    model = kind.build(folder)
    with training.seeded(seed):
        hf_lora.wrap(model if whole else model.transformers_model, **FIELDS, **kind.fields)
    return model


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "the transformer inside"])
def test_resumed_it_is_bit_identical(kind: Kind, folder: Path, tmp_path: Path, whole: bool):
    first = wrapped(kind, folder, whole=whole)
    kind.trainer(first, tmp_path / "first").train()
    checkpoint = tmp_path / "first" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    second = wrapped(kind, folder, seed=9, whole=whole)
    kind.trainer(second, tmp_path / "second").train(resume_from_checkpoint=str(checkpoint))
    assert same(tensors(first), tensors(second))
    assert torch.equal(kind.answers(first), kind.answers(second))


def test_the_best_model_is_loaded_at_the_end(kind: Kind, folder: Path, tmp_path: Path):
    model = wrapped(kind, folder)
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # the higher loss, which is that of the earlier step
        "metric_for_best_model": "eval_loss",
    }
    trainer = kind.trainer(model, tmp_path, **options)
    base = base_tensors(model.transformers_model)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    saved = training.saved(tmp_path / "checkpoint-2")
    assert same(training.in_file_names(model.transformers_model), saved)
    assert same(base_tensors(model.transformers_model), base)
    assert not same(saved, training.saved(tmp_path / "checkpoint-4"))
    answers = kind.answers(kind.reload(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(kind.answers(model), answers, rtol=1e-5, atol=1e-6)


def test_a_best_model_that_cannot_be_read_is_an_error(folder: Path, tmp_path: Path):
    """sentence-transformers would log it, and leave the last one in its place."""
    trainer = bi_trainer(wrapped(BI, folder), tmp_path)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    weights = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    before = tensors(trainer.model)
    with pytest.raises(AdapterFileError):
        trainer._load_best_model()
    assert same(tensors(trainer.model), before)


def test_saved_it_loads_again(kind: Kind, folder: Path, tmp_path: Path):
    """By sentence-transformers with PEFT, and onto a base by hf_lora."""
    model = wrapped(kind, folder)
    kind.trainer(model, tmp_path / "run", save_strategy="no").train()
    model.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    again = kind.reload(tmp_path / "saved")
    assert any(isinstance(module, LoraLayer) for module in again.modules())
    torch.testing.assert_close(kind.answers(again), kind.answers(model), rtol=1e-5, atol=1e-6)
    ours = kind.build(folder)
    assert hf_lora.load(ours, tmp_path / "saved") is ours
    assert same(adapter_tensors(ours), adapter_tensors(model))


def test_from_a_plan_to_the_base_again(kind: Kind, folder: Path, tmp_path: Path):
    model = kind.build(folder)
    plain, before = kind.answers(model), tensors(model)
    plan = hf_lora.plan(model, **FIELDS, **kind.fields)
    assert len(plan.targets) == 4
    assert not plan.problems
    with training.seeded(1):
        hf_lora.wrap(model, **FIELDS, **kind.fields)
    torch.testing.assert_close(kind.answers(model), plain, rtol=1e-5, atol=1e-6)
    kind.trainer(model, tmp_path / "run", save_strategy="no").train()
    adapted = kind.answers(model)
    assert (adapted - plain).abs().max() > 1e-3
    hf_lora.merge(model)
    torch.testing.assert_close(kind.answers(model), adapted, rtol=1e-4, atol=1e-5)
    hf_lora.unmerge(model)
    assert torch.equal(kind.answers(model), adapted)
    hf_lora.unwrap(model)
    own = {k: v for k, v in tensors(model).items() if not k.startswith("2.")}  # the layer after it
    assert same(own, {k: v for k, v in before.items() if not k.startswith("2.")})


def test_a_merged_model_is_saved_whole(kind: Kind, folder: Path, tmp_path: Path):
    """And needs neither hf_lora nor PEFT to be opened."""
    model = wrapped(kind, folder)
    kind.trainer(model, tmp_path / "run", save_strategy="no").train()
    adapted = kind.answers(model)
    hf_lora.merge_and_unwrap(model)
    model.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    again = kind.reload(tmp_path / "saved")
    torch.testing.assert_close(kind.answers(again), adapted, rtol=1e-4, atol=1e-5)


def test_every_verb_means_the_transformer_inside(folder: Path, tmp_path: Path):
    model = bi_encoder(folder)
    before = BI.answers(model)
    assert hf_lora.wrap(model, **FIELDS) is model
    inner = model.transformers_model
    assert [found for found, _ in (find(model), find(inner)) if found is inner] == [inner, inner]
    assert hf_lora.plan(bi_encoder(folder), **FIELDS).targets[0].path.startswith("encoder.layer.0")
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if name.endswith("lora_B"):
                parameter.add_(0.1)
    assert not torch.allclose(BI.answers(model), before)
    with hf_lora.no_adapter(model):
        assert torch.equal(BI.answers(model), before)
    hf_lora.save(model, tmp_path)
    assert set(training.files(tmp_path)) == {"adapter_config.json", "adapter_model.safetensors"}
    hf_lora.unwrap(model)
    assert torch.equal(BI.answers(model), before)


def test_what_wrap_was_given_comes_back(kind: Kind, folder: Path, tmp_path: Path):
    """Not the transformers model inside, which is no such model; nor a wrapper around it."""
    model = wrapped(kind, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.add_(0.1)
    expected = kind.answers(model)
    assert hf_lora.merge_and_unwrap(model) is model
    torch.testing.assert_close(kind.answers(model), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(str(tmp_path / "whole"))
    again = kind.reload(tmp_path / "whole")
    assert find(again) is None
    assert torch.equal(kind.answers(again), kind.answers(model))
    for around in (lambda given: given, torch.compile):
        model = wrapped(kind, folder)
        assert hf_lora.unwrap(around(model)) is model
    inner = wrapped(kind, folder).transformers_model
    assert hf_lora.unwrap(inner) is inner


def test_the_base_in_memory_need_not_be_the_one_on_disk(folder: Path, tmp_path: Path):
    """Loading a second model from the checkpoint would put the disk's base into the model."""

    def start(seed: int) -> Any:
        model = bi_encoder(folder)
        with torch.no_grad():
            model.transformers_model.encoder.layer[0].output.dense.weight.add_(0.1)
        with training.seeded(seed):
            return hf_lora.wrap(model, **FIELDS)

    first, second = start(1), start(9)
    base = base_tensors(first.transformers_model)
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    with pytest.warns(HfLoRAWarning, match="which only this process has"):
        bi_trainer(first, tmp_path / "first").train()
    with pytest.warns(HfLoRAWarning, match="which only this process has"):
        bi_trainer(second, tmp_path / "second").train(resume_from_checkpoint=checkpoint)
    assert same(tensors(first), tensors(second))
    assert same(base_tensors(second.transformers_model), base)


def test_a_router_with_two_models_of_which_each_is_wrapped(folder: Path, tmp_path: Path):
    def build(seed: int) -> Any:
        path = str(save_bert(folder / "bert", BertModel))
        parts = [Transformer(path), Transformer(path)]
        with training.seeded(seed):
            for part in parts:
                hf_lora.wrap(part.model, **FIELDS)
        router = Router.for_query_document([parts[0]], [parts[1]])
        return SentenceTransformer(modules=[router, Pooling(32)], device="cpu")

    routes = {"sentence1": "query", "sentence2": "document"}
    first, second = build(1), build(9)
    bi_trainer(first, tmp_path / "first", router_mapping=routes).train()
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    assert Path(checkpoint, MANIFEST_FILE).exists()
    again = bi_trainer(second, tmp_path / "second", router_mapping=routes)
    again.train(resume_from_checkpoint=checkpoint)
    assert same(tensors(first), tensors(second))


def test_a_sparse_encoder(folder: Path, tmp_path: Path):
    from transformers import BertForMaskedLM

    model = SparseEncoder(str(save_bert(folder / "masked", BertForMaskedLM)), device="cpu")
    hf_lora.wrap(model, **FIELDS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.add_(0.1)
    model.save_pretrained(str(tmp_path / "saved"))
    again = SparseEncoder(str(tmp_path / "saved"), device="cpu")
    ours, theirs = (m.encode(TEXTS, convert_to_tensor=True).to_dense() for m in (model, again))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_run_that_would_change_nothing_is_stopped(folder: Path, tmp_path: Path):
    model = SentenceTransformer(
        modules=[Transformer(str(save_bert(folder / "bert", BertModel))), Pooling(32)],
        device="cpu",
    )
    hf_lora.save(hf_lora.wrap(model, **FIELDS), tmp_path / "adapter")
    hf_lora.unwrap(model)
    hf_lora.load(model, tmp_path / "adapter")  # not to be trained
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(GradientError, match="Nothing would train"):
        bi_trainer(model, tmp_path / "run").train()


class TestModelsThatAreNotOurs:
    def test_a_plain_one_resumes_as_ever(self, folder: Path, tmp_path: Path):
        wrapped(BI, folder)
        first, second = bi_encoder(folder), bi_encoder(folder)
        bi_trainer(first, tmp_path / "first").train()
        checkpoint = str(tmp_path / "first" / "checkpoint-2")
        bi_trainer(second, tmp_path / "second").train(resume_from_checkpoint=checkpoint)
        assert same(tensors(first), tensors(second))

    def test_one_of_pefts_is_not_touched(self, folder: Path):
        wrapped(BI, folder)
        model = bi_encoder(folder)
        model[0].model = get_peft_model(model[0].model, LoraConfig(target_modules=["query"]))
        assert find(model) is None
        assert not is_sentence_model(model)


def test_what_hf_lora_hooks_into_is_there():
    training.wrapped()
    from sentence_transformers.base import model, trainer

    _, methods = trainer_patch._METHODS["sentence_transformers.base.trainer"]
    for method in methods:
        assert is_in_front(vars(trainer.BaseTrainer)[method]), f"BaseTrainer.{method}"
    assert issubclass(SentenceTransformer, model.BaseModel)
    folders = inspect.getsource(model.BaseModel.save) + inspect.getsource(Router.save)
    for part in (
        "save_in_root",
        'str(idx) + "_" + type(module)',
        "{name}_{module_idx}_{type(model)",
    ):
        assert part in folders, f"where a module is saved: {part}"
