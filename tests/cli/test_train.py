"""``hf-lora train``: real training of a tiny model, several rates, resuming, quantizing."""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

import hf_lora
from hf_lora.recipes.base_model import check_writes_text, load_config, load_tokenizer
from hf_lora.recipes.dataset import collate, load_examples
from hf_lora.recipes.file import read_recipe
from hf_lora.recipes.history import read_history
from hf_lora.recipes.recipe import Base
from tests.tiny_base import EXAMPLES, Run

Write = Callable[[str, Any], Path]
ROWS = [
    {"prompt": f"{word}:", "completion": f" {word[::-1]}"}
    for word in ("rank", "alpha", "model", "matrix", "small", "large", "weight", "train", "file")
]
RATES = [1e-5, 2e-2, 1e-3]
NAMES = ("chat", "completion", "text", "lr_sweep", "classification", "dpo", "reward")


@pytest.fixture
def recipe(write: Write, base: Path) -> Callable[..., Path]:
    """A recipe for the tiny base; keyword arguments change its sections' fields."""
    write("rows.jsonl", ROWS)

    def make(name: str = "recipe.json", **changes: Any) -> Path:
        content: dict[str, Any] = {
            "base": {"model": str(base)},
            "data": {
                "form": "completion",
                "train": "rows.jsonl",
                "eval": 0.25,
                "loss": "completions",
            },
            "lora": {"targets": ["q_proj", "v_proj", "down_proj"], "r": 4, "dropout": 0.1},
            "trainer": {
                "learning_rate": 1e-2,
                "max_steps": 8,
                "per_device_train_batch_size": 2,
                "logging_steps": 1,
                "save_steps": 4,
            },
            "output": "out",
        }
        for section, fields in changes.items():
            if isinstance(fields, dict):
                content.setdefault(section, {}).update(fields)
            else:
                content[section] = fields
        return write(name, content)

    return make


def result(run: Run, *arguments: Any) -> dict[str, Any]:
    return json.loads(run("train", *arguments, "--json").stdout)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def by_hand(path: Path, rate: float, output: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """The same training in the plain words of hf_lora and Trainer: its eval loss and tensors."""
    recipe = read_recipe(path)
    tokenizer, config = load_tokenizer(recipe.base), load_config(recipe.base)
    examples = load_examples(recipe.data, tokenizer, config, seed=42)
    model = AutoModelForCausalLM.from_pretrained(recipe.base.model)
    set_seed(42)
    hf_lora.wrap(model, config=recipe.lora)
    fields = {**recipe.trainer, "learning_rate": rate, "output_dir": str(output)}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**fields, dataloader_pin_memory=False, disable_tqdm=True),
        train_dataset=examples.train,  # type: ignore[arg-type]
        eval_dataset=examples.eval,  # type: ignore[arg-type]
        data_collator=collate,
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    hf_lora.save(model, output)
    return loss, load_file(output / "adapter_model.safetensors")


def test_a_list_of_learning_rates_is_that_many_trainings_apart(
    run: Run, recipe: Callable[..., Path], tmp_path: Path
):
    """Each try equals a training by hand on a fresh base, to the bit; the best one is kept."""
    path = recipe(
        data={"eval": "rows.jsonl"}, trainer={"learning_rate": RATES, "save_strategy": "no"}
    )
    found = result(run, path)
    hands = [by_hand(path, rate, tmp_path / f"hand-{rate}") for rate in RATES]
    assert [each["learning_rate"] for each in found["tries"]] == RATES
    assert [each["eval_loss"] for each in found["tries"]] == [loss for loss, _ in hands]
    losses = [loss for loss, _ in hands]
    assert len(set(losses)) == 3
    best = losses.index(min(losses))
    assert RATES[best] == 2e-2  # neither the first nor the last
    assert found["best"] == found["tries"][best]
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = hands[best][1]
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[key], expected[key]) for key in kept)
    none = dict.fromkeys(("cut", "dropped", "unused"), 0)
    assert found["examples"] == {"train": 9, "eval": 9, "rows": 18, **none}
    assert found["bytes"] == len(weights(tmp_path / "out"))
    assert found["pushed"] is None


def test_the_loss_falls_and_the_adapter_loads(
    run: Run, recipe: Callable[..., Path], tmp_path: Path, base: Path
):
    said = run("train", recipe(data={"eval": "rows.jsonl"}, trainer={"max_steps": 60}))
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in said.stderr.splitlines()
        if " loss " in line
    ]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert "learning rate" in said.stdout
    assert str(tmp_path / "out") in said.stdout
    model = hf_lora.from_pretrained(tmp_path / "out").eval()
    recipe_ = read_recipe(tmp_path / "recipe.json")
    examples = load_examples(
        recipe_.data, load_tokenizer(recipe_.base), load_config(recipe_.base), seed=0
    )
    with torch.no_grad():
        adapted = model(**collate(examples.eval or [])).loss
        with hf_lora.no_adapter(model):
            before = model(**collate(examples.eval or [])).loss
    assert adapted < 0.5 * before
    table = said.stdout.splitlines()[1].split()
    assert float(table[3]) == pytest.approx(float(adapted), rel=0.05)


def test_what_is_of_use_lies_beside_the_adapter(
    run: Run, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = run("train", recipe()).stdout
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    bases = load_tokenizer(read_recipe(recipe()).base)
    assert tokenizer.chat_template == bases.chat_template is not None
    assert tokenizer("rank")["input_ids"] == bases("rank")["input_ids"]
    losses = [row["loss"] for row in read_history(out) if "loss" in row]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{out} (" in told
    assert "the tokenizer, loss.png, history.json, training.json beside it" in told
    commands = [line.split()[:2] for line in told.split("next:\n")[1].splitlines()]
    assert commands == [["hf-lora", name] for name in ("generate", "chat", "eval", "merge", "push")]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run("train", recipe(output="plain"))
    assert (tmp_path / "plain" / "history.json").is_file()
    assert not (tmp_path / "plain" / "loss.png").exists()


def test_what_trainer_evaluated_last_is_not_evaluated_again(
    run: Run, recipe: Callable[..., Path], tmp_path: Path
):
    fields = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no"}
    lora = {"dropout": 0}  # an evaluation on the way draws random numbers
    twice = run("train", recipe(trainer=fields, lora=lora), "--json")
    losses = [line for line in twice.stderr.splitlines() if "eval_loss" in line]
    assert [line.split(":")[0] for line in losses] == ["step 4", "step 8"]
    alone = result(run, recipe(output="alone", trainer={"eval_strategy": "no"}, lora=lora))
    assert json.loads(twice.stdout)["best"]["eval_loss"] == alone["best"]["eval_loss"]
    # the best model is another than the last, and is the one whose loss is told
    best = {**fields, "save_strategy": "steps", "load_best_model_at_end": True}
    best |= {"learning_rate": 1.0, "eval_steps": 1, "save_steps": 1}
    kept = run("train", recipe(output="best", trainer=best, lora=lora), "--json")
    lines = [line for line in kept.stderr.splitlines() if "eval_loss" in line]
    losses = [float(line.split("eval_loss ")[1].split(",")[0]) for line in lines]
    told = json.loads(kept.stdout)["best"]["eval_loss"]
    assert told == pytest.approx(min(losses), rel=1e-3)
    assert told < losses[7], losses


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    run: Run, recipe: Callable[..., Path], tmp_path: Path
):
    path = recipe()
    whole = result(run, path)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "out", cut)
    # what a killed process leaves: a checkpoint half way and nothing that is finished
    shutil.rmtree(cut / "checkpoints" / "checkpoint-8")
    for file in cut.glob("adapter_*"):
        file.unlink()
    record = json.loads((cut / "training.json").read_text())
    (cut / "training.json").write_text(json.dumps({**record, "tries": []}))
    resumed = result(run, path, "--output", cut, "--resume")
    assert weights(cut) == weights(tmp_path / "out")
    assert resumed["best"]["eval_loss"] == whole["best"]["eval_loss"]
    assert resumed["best"]["steps"] == 8
    log = json.loads((cut / "checkpoints/checkpoint-8/trainer_state.json").read_text())
    assert [entry["step"] for entry in log["log_history"] if "loss" in entry] == [*range(1, 9)]
    # nothing is left to do, so nothing changes
    times = {file: file.stat().st_mtime_ns for file in cut.rglob("*.safetensors")}
    assert result(run, path, "-o", cut, "--resume")["tries"] == resumed["tries"]
    assert times == {file: file.stat().st_mtime_ns for file in cut.rglob("*.safetensors")}


def test_resuming_several_learning_rates_does_what_is_left(
    run: Run, recipe: Callable[..., Path], tmp_path: Path
):
    path = recipe(trainer={"learning_rate": RATES, "max_steps": 4, "save_strategy": "no"})
    whole = result(run, path)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "out", cut)
    # a time that no try can take tells what was kept from what was trained again
    kept = [{**each, "seconds": 12345.0} for each in record["tries"][:2]]
    (cut / "training.json").write_text(json.dumps({**record, "tries": kept}))
    resumed = result(run, path, "-o", cut, "--resume")
    assert resumed["tries"][:2] == kept
    assert resumed["tries"][2]["eval_loss"] == whole["tries"][2]["eval_loss"]
    assert resumed["best"]["learning_rate"] == whole["best"]["learning_rate"]
    assert weights(cut) == weights(tmp_path / "out")


def test_a_training_that_failed_at_once_is_nothing_to_resume(
    run: Run, recipe: Callable[..., Path], tmp_path: Path
):
    assert "q_prjo" in run("train", recipe(lora={"targets": ["q_prjo"]}), code=1).stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["training.json"]
    run("train", recipe(trainer={"max_steps": 1}))


def test_what_is_in_the_output_is_not_written_over(
    run: Run, recipe: Callable[..., Path], tmp_path: Path
):
    path = recipe(trainer={"max_steps": 1})
    run("train", path)
    before = weights(tmp_path / "out")
    assert "holds an adapter or a training already" in run("train", path, code=1).stderr
    other = recipe("other.json", trainer={"max_steps": 2})
    assert "another recipe" in run("train", other, "--resume", code=1).stderr
    (tmp_path / "out" / "training.json").write_text("{")
    assert "cannot be read" in run("train", path, "--resume", code=1).stderr
    assert weights(tmp_path / "out") == before


def test_a_training_that_diverges_is_never_the_best(
    run: Run, recipe: Callable[..., Path], tmp_path: Path
):
    rates = [1e38, 1e-3]
    path = recipe(trainer={"learning_rate": rates, "max_grad_norm": 0, "warmup_steps": 0})
    found = result(run, path)
    assert found["tries"][0]["eval_loss"] is None
    assert found["best"]["learning_rate"] == 1e-3
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_trainings_that_all_diverge_save_nothing(
    run: Run, recipe: Callable[..., Path], tmp_path: Path
):
    for rates in ([1e38, 1e37], [1e38]):
        fields = {"learning_rate": rates, "max_grad_norm": 0, "warmup_steps": 0}
        path = recipe(output=f"of {len(rates)}", trainer=fields)
        assert "GradientError" in run("train", path, "--json", code=1).stdout
        assert not (tmp_path / f"of {len(rates)}" / "adapter_model.safetensors").exists()


def test_bfloat16_several_times_over(run: Run, recipe: Callable[..., Path], base: Path):
    """Mixed precision wraps the model's forward; each try must begin with the plain one."""
    path = recipe(trainer={"learning_rate": [1e-3, 1e-2], "bf16": True, "use_cpu": True})
    found = result(run, path)
    alone = recipe("b.json", output="alone", trainer={"bf16": True, "use_cpu": True})
    assert result(run, alone)["best"]["eval_loss"] == found["tries"][1]["eval_loss"]


def test_a_module_trained_in_full_is_saved_with_the_adapter(
    run: Run, recipe: Callable[..., Path], tmp_path: Path
):
    path = recipe(
        lora={"train": ["model.norm"]}, trainer={"learning_rate": [1e-2, 1e-3], "max_steps": 3}
    )
    result(run, path)
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    (norm,) = [tensor for key, tensor in kept.items() if key.endswith("model.norm.weight")]
    assert not torch.equal(norm, torch.ones_like(norm))


def test_what_cannot_work_is_said_before_the_weights_are_read(
    run: Run, recipe: Callable[..., Path], base: Path, tmp_path: Path
):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    path = recipe(base={"model": str(broken)}, data={"max_length": 513})
    assert "the base reads 512 tokens" in run("train", path, code=1).stderr
    path = recipe(base={"model": str(broken)})
    assert "The model of" in run("train", path, code=1).stderr
    path = recipe(lora={"targets": ["q_prjo"]})
    assert "q_proj" in run("train", path, code=1).stderr


def test_a_quantized_base(run: Run, recipe: Callable[..., Path], tmp_path: Path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    said = result(
        run,
        recipe(
            base={"load_in_4bit": True, "dtype": "float32"},
            lora={"targets": ["q_proj", "up_proj"], "r": 4},
            trainer={"max_steps": 3},
        ),
    )
    assert said["best"]["steps"] == 3
    facts = json.loads(run("show", tmp_path / "out", "--json").stdout)
    assert facts["header"]["fingerprint"]["quantized"] is True
    assert facts["dead"] == []
    model = hf_lora.from_pretrained(
        tmp_path / "out", quantization_config=_nf4(), dtype=torch.float32
    )
    assert isinstance(model.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear4bit)


def _nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_an_example_runs(run: Run, path: Path, base: Path, tmp_path: Path):
    """As it stands, but on the tiny base, and for a few steps."""
    before = copy.deepcopy(sorted(EXAMPLES.rglob("*.json")))
    settings = [f"base.model={base}", "trainer.max_steps=3", "trainer.logging_steps=1"]
    arguments = [text for setting in settings for text in ("--set", setting)]
    found = result(run, path, *arguments, "--output", tmp_path / "out")
    assert found["best"]["steps"] == 3
    assert found["examples"]["train"] > 5
    assert found["examples"]["cut"] == found["examples"]["dropped"] == 0
    facts = json.loads(run("show", tmp_path / "out", "--json").stdout)
    assert facts["dead"] == []
    assert facts["base"] == str(base)
    rates = read_recipe(path).trainer["learning_rate"]
    assert len(found["tries"]) == (len(rates) if isinstance(rates, list) else 1)
    assert sorted(EXAMPLES.rglob("*.json")) == before  # nothing is written beside the recipe


def test_the_examples_are_all_there():
    found = {path.name for path in EXAMPLES.glob("*.yaml")}
    assert found == {f"{name}.yaml" for name in NAMES}


class TestABaseThatIsNoCausalLanguageModel:
    """It is refused before data or weights are read, and the way is named."""

    @staticmethod
    def saved(folder: Path, model: Any) -> Path:
        model.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        "name", ["BertForMaskedLM", "BertModel", "T5ForConditionalGeneration", "LlamaModel"]
    )
    def test_it_is_refused(self, run: Run, recipe: Any, tmp_path: Path, name: str):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "d_model": 32}
        sizes |= {"num_attention_heads": 2, "num_layers": 1, "num_heads": 2, "vocab_size": 400}
        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**sizes))
        path = recipe(base={"model": str(self.saved(tmp_path / "other", model))})
        said = " ".join(run("train", path, code=1).stderr.split())
        assert f"is a {name}, and a causal language model is needed here" in said
        assert "hf_lora.wrap(...)" in said
        assert not (tmp_path / "out").exists()

    def test_a_decoder_of_such_a_family_is_one(self, tmp_path: Path):
        config = transformers.BertConfig(
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "vocab_size": 400, "is_decoder": True},
        )
        folder = self.saved(tmp_path / "other", transformers.BertLMHeadModel(config))
        check_writes_text(load_config(Base(model=str(folder))))
