"""What a visitor can do with a card: talk to the model, serve it, see how it was trained."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import hf_lora
from hf_lora.files.read import read_folder
from hf_lora.hub import push_folder
from hf_lora.hub.card.card import folder_card
from hf_lora.hub.card.facts import Training
from hf_lora.hub.push_folder import push_adapter_folder
from tests.oracle.adapting import scramble
from tests.tiny_base import base, tiny_model, tiny_tokenizer, tokenizer

__all__ = ["base", "tokenizer"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model()
    torch.manual_seed(0)
    hf_lora.wrap(model, r=4)
    scramble(model)
    hf_lora.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cards that a push would put on the Hub, without one."""
    found: list[str] = []

    def push(root: Path, repo_id: str, *, card: Any, **fields: Any) -> str:
        found.append(card(repo_id))
        return "address"

    monkeypatch.setattr(push_folder, "push_folder", push)
    monkeypatch.setattr(push_folder, "base_license", lambda *_: {"license": "apache-2.0"})
    return found


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_chat_is_talked_with(folder: Path, pushed: list[str], base: Path):
    tiny_tokenizer().save_pretrained(folder)
    push_adapter_folder(folder, "me/parrot", base="me/base")
    (card,) = pushed
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert "tokenizer.apply_chat_template(" in code
    assert 'AutoTokenizer.from_pretrained("me/parrot")' in code
    # what it says, on this machine
    said: list[str] = []
    own = {
        "hf_lora": type(
            "Here",
            (),
            {
                "from_pretrained": lambda _: hf_lora.load(
                    AutoModelForCausalLM.from_pretrained(base), folder
                )
            },
        ),
    }
    lines = code.replace("import hf_lora\n", "").replace('"me/parrot"', "SOURCE")
    exec(lines.replace("print(", "said.append("), {**own, "SOURCE": str(folder), "said": said})
    model = hf_lora.load(AutoModelForCausalLM.from_pretrained(base), folder)
    batch = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Who are you?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**batch, max_new_tokens=200)[0, batch["input_ids"].shape[1] :]
    assert said == [AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)]
    message = {"role": "user", "content": "Who are you?"}
    assert metadata(card)["widget"] == [{"messages": [message]}]


@pytest.mark.parametrize("settings", [None, "{", "[]", '{"chat_template": null}', "{}"])
def test_what_has_no_template_continues_text(folder: Path, pushed: list[str], settings: str | None):
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(settings)
    push_adapter_folder(folder, "me/text", base="me/base")
    assert 'tokenizer("Once upon a time"' in pushed[0]
    assert metadata(pushed[0])["widget"] == [{"text": "Once upon a time"}]


def test_a_template_in_the_settings_is_one(folder: Path, pushed: list[str]):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    push_adapter_folder(folder, "me/chat", base="me/base")
    assert "apply_chat_template(" in pushed[0]


def test_it_is_served_under_the_name_that_it_has(folder: Path):
    adapters = {"default": read_folder(folder)}
    card = folder_card(adapters, "me/parrot", base="me/base")
    assert (
        "```bash\nvllm serve me/base --enable-lora --max-lora-rank 8 \\\n"
        "    --lora-modules parrot=me/parrot\n```"
    ) in card
    assert "vllm serve" not in folder_card(adapters, "me/parrot", base=None)
    assert "vllm serve" not in folder_card({"fr": adapters["default"]}, "me/x", base="me/base")


def test_what_vllm_cannot_serve_is_not_offered(tmp_path: Path):
    model = hf_lora.wrap(tiny_model(tie_word_embeddings=False), r=4, train=["lm_head"])
    hf_lora.save(model, tmp_path)
    card = folder_card({"default": read_folder(tmp_path)}, "me/x", base="me/base")
    assert "vllm serve" not in card
    assert "vLLM cannot" in card


def test_training_is_told_and_shown(folder: Path, pushed: list[str]):
    (folder / "loss.png").write_bytes(b"\x89PNG")
    training = Training(
        dataset_words="24 examples.",
        metrics={"eval_loss": 0.5},
        hyperparameters={"learning_rate": 2e-4, "steps": 12},
    )
    push_adapter_folder(folder, "me/parrot", base="me/base", training=training)
    (card,) = pushed
    assert "![Losses in training, by step](loss.png)" in card
    for told in ("24 examples.", "| eval_loss | 0.5 |", "| learning_rate | 0.0002 |"):
        assert told in card
    assert metadata(card)["license"] == "apache-2.0"
    (folder / "loss.png").unlink()
    push_adapter_folder(folder, "me/parrot", base="me/base", training=training)
    assert "loss.png" not in pushed[1]


def test_the_metadata_is_what_the_hub_takes(folder: Path, pushed: list[str]):
    tiny_tokenizer().save_pretrained(folder)
    push_adapter_folder(folder, "me/parrot", base="me/base")
    data = ModelCard(pushed[0]).data.to_dict()
    assert data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "me/base"
    for example in data["widget"]:
        assert example.keys() in ({"text"}, {"messages"})
        assert all(m.keys() == {"role", "content"} for m in example.get("messages", ()))


def test_what_writes_no_text_has_no_widget(tmp_path: Path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = BertModel(BertConfig(**sizes, num_attention_heads=2, vocab_size=32))
    hf_lora.save(hf_lora.wrap(model, "query", r=2), tmp_path)
    training = dataclasses.replace(Training(), chat=True, processor=True)
    card = folder_card({"default": read_folder(tmp_path)}, "me/x", base="me/b", training=training)
    assert "widget" not in metadata(card)
    assert "apply_chat_template" not in card
    assert "vllm serve" not in card
