"""``hf-lora plan``: the plan of a model without its weights, in words and as JSON."""

import json
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

import hf_lora
from tests.tiny_base import Run, tiny_model


@pytest.fixture(scope="module")
def bare(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def test_no_weights_are_needed_and_the_plan_is_that_of_the_loaded_model(
    run: Run, bare: Path, base: Path
):
    options = ["--targets", "q_proj", "--targets", "down_proj", "--r", 3, "--alpha", 6, "--rslora"]
    found = json.loads(run("plan", bare, *options, "--json").stdout)
    model = AutoModelForCausalLM.from_pretrained(base)
    plan = hf_lora.plan(model, targets=["q_proj", "down_proj"], r=3, alpha=6.0, rslora=True)
    assert [target["path"] for target in found["targets"]] == [t.path for t in plan.targets]
    numbers = {"r": 3, "alpha": 6.0, "dropout": 0.0, "rslora": True}
    assert found["targets"][0]["slot"] == numbers | {"parts": [], "bias": False, "lora_bias": False}
    assert found["targets"][0]["dtype"] == "torch.float32"
    for name in ("parameters", "file_bytes", "adam_bytes", "base_parameters", "base_bytes"):
        assert found[name] == getattr(plan, name), name
    assert sum(target["parameters"] for target in found["targets"]) == plan.parameters
    assert found["matches"] == {"q_proj": 2, "down_proj": 2}
    assert found["problems"] == []
    assert run("plan", bare, *options).stdout == f"{plan}\n"


def test_the_stored_type_is_what_the_base_is_counted_in(run: Run, tmp_path: Path):
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path)
    found = json.loads(run("plan", tmp_path, "--json").stdout)
    assert found["base_bytes"] == 2 * model.num_parameters()
    # adapters on a 16-bit base are float32
    assert found["weight_bytes"] == 4 * found["parameters"]


def test_a_tied_head_is_told(run: Run, bare: Path):
    output = run("plan", bare, "-t", "lm_head").stdout
    assert "model.embed_tokens" in output


def test_a_config_file_and_options_before_it(run: Run, bare: Path, tmp_path: Path):
    config = tmp_path / "lora.yaml"
    hf_lora.LoRAConfig(targets=["q_proj", "v_proj"], r=2, exclude=["v_proj"]).to_file(config)
    found = json.loads(run("plan", bare, "--config", config, "--r", 5, "--json").stdout)
    assert found["config"]["r"] == 5
    assert found["config"]["exclude"] == ["v_proj"]
    assert {target["slot"]["r"] for target in found["targets"]} == {5}
    assert all(target["path"].endswith("q_proj") for target in found["targets"])


def test_what_the_checkpoint_lacks_is_found_by_the_names_in_its_files(run: Run, tmp_path: Path):
    config = BertConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    BertModel(config).save_pretrained(tmp_path)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    output = run("plan", tmp_path, "-t", "query").stdout
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    assert output == f"{hf_lora.plan(model, targets=['query'])}\n"
    assert "so trained and saved with the adapter: classifier" in output
    lora = tmp_path / "lora.yaml"
    lora.write_text("targets: [query]\ntrain: []\n")
    assert "neither trained nor saved: classifier" in run("plan", tmp_path, "--config", lora).stdout


def test_problems_are_shown_and_end_with_1(run: Run, bare: Path):
    result = run("plan", bare, "--targets", "q_prjo", code=1)
    assert "PROBLEM" in result.stdout
    assert "q_proj" in result.stdout
    found = json.loads(run("plan", bare, "--targets", "q_prjo", "--json", code=1).stdout)
    assert len(found["problems"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--r", "0"], "r: 0 is not a whole number of at least 1"),
        (["--config", "absent.yaml"], "absent.yaml cannot be read"),
        (["--dtype", "int8"], "dtype: 'int8' is not one of"),
    ],
)
def test_what_is_refused_is_told_on_stderr(run: Run, bare: Path, arguments: list[str], words: str):
    result = run("plan", bare, *arguments, code=1)
    assert result.stdout == ""
    assert words in result.stderr
    assert "Traceback" not in result.output
    error = json.loads(run("plan", bare, *arguments, "--json", code=1).stdout)["error"]
    assert error["type"] == "ConfigError"
    assert words in error["message"]


def test_a_model_that_is_not_there(run: Run, tmp_path: Path):
    result = run("plan", tmp_path / "absent", code=1)
    assert "cannot be loaded" in result.stderr
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "no-such-model" in run("plan", tmp_path, code=1).stderr


def test_code_from_strangers_is_not_run_and_not_asked_about(run: Run, bare: Path, tmp_path: Path):
    config = json.loads((bare / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('stranger')")
    assert "trust_remote_code" in run("plan", tmp_path, code=1).stderr


def test_many_processes(run: Run, bare: Path):
    found = json.loads(run("plan", bare, "--world", 4, "--json").stdout)
    ways = {each["strategy"]: each for each in found["per_rank"]}
    assert ways["DDP"]["gradients"] == found["gradient_bytes"]
    assert ways["FSDP2"]["gradients"] == -(-found["gradient_bytes"] // 4)
    assert "each of 4 processes" in run("plan", bare, "--world", 4).stdout
    run("plan", bare, "--world", 0, code=1)
