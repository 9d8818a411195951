"""The code in a pushed card is taken out of it and run, for every kind of model."""

import re
from pathlib import Path

import pytest

from tests.hub.hub_worker import Worker
from tests.hub_server import HubServer, hub_environment, run_python

# A way to make each kind of base, with what prepares its inputs, and to adapt it.
KINDS = """
import PIL.Image
from transformers import (
    AutoModelForImageClassification, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification,
    AutoModelForTokenClassification, BertConfig, BertForSequenceClassification, BertModel,
    GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, ViTConfig,
    ViTForImageClassification, ViTImageProcessorPil)

def bert(**fields):
    return BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=32, **fields)

def place(name, model, processor):
    torch.manual_seed(0)
    folder = f"bases/{name}"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    api = HfApi()
    api.create_repo(f"user/{name}", exist_ok=True)
    api.upload_folder(repo_id=f"user/{name}", folder_path=folder)
    return f"user/{name}"

def causal():
    return adapted()

def gpt2():
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    place("gpt2", GPT2LMHeadModel(config), tiny_tokenizer())
    model = AutoModelForCausalLM.from_pretrained("user/gpt2")
    return stirred(hf_lora.wrap(model, "c_attn", r=2))

def seq2seq():
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2,
        decoder_start_token_id=1, pad_token_id=1, eos_token_id=63)
    place("t5", T5ForConditionalGeneration(config), tiny_tokenizer())
    model = AutoModelForSeq2SeqLM.from_pretrained("user/t5")
    return stirred(hf_lora.wrap(model, ["q", "v"], r=2))

def classifier():
    place("bert", BertModel(bert()), tiny_tokenizer())
    model = AutoModelForSequenceClassification.from_pretrained(
        "user/bert", id2label={0: "good", 1: "bad", 2: "so \\"so\\""})
    return stirred(hf_lora.wrap(model, "query", r=2, train=["classifier"]))

def numbered():
    place("bert", BertModel(bert()), tiny_tokenizer())
    model = AutoModelForTokenClassification.from_pretrained("user/bert", num_labels=5)
    return stirred(hf_lora.wrap(model, "query", r=2, train=["classifier"]))

def finished_head():
    # the base can classify already, and its head stays as it is
    place("judge", BertForSequenceClassification(bert(num_labels=4)), tiny_tokenizer())
    model = AutoModelForSequenceClassification.from_pretrained("user/judge")
    return stirred(hf_lora.wrap(model, "query", r=2))

def images():
    # the base has a head for 5 classes, and the adapter one for 3
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=16, patch_size=8, num_labels=5)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    place("vit", ViTForImageClassification(config), processor)
    model = AutoModelForImageClassification.from_pretrained(
        "user/vit", id2label={0: "cat", 1: "dog", 2: "cow"}, ignore_mismatched_sizes=True)
    PIL.Image.new("RGB", (20, 20), (200, 30, 30)).save("image.jpg")
    return stirred(hf_lora.wrap(model, ["q_proj", "v_proj"], r=2, train=["classifier"]))

def example(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)}
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return {"input_ids": IDS, **extra}

def answer(model):
    with torch.no_grad():
        return model.eval()(**example(model)).logits
"""


def code_in(card: str) -> str:
    found = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return found[0]


def card_of(hub: HubServer, repo_id: str) -> str:
    return hub.files(repo_id)["README.md"].decode()


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("causal", "text-generation"),
        ("gpt2", "text-generation"),
        ("seq2seq", None),
        ("classifier", "text-classification"),
        ("numbered", "token-classification"),
        ("finished_head", "text-classification"),
        ("images", "image-classification"),
    ],
)
def test_the_code_of_a_card_loads_what_was_pushed(
    hub: HubServer, worker: Worker, kind: str, task: str | None
):
    """With nothing but the Hub: the model that it makes answers as the one that was pushed."""
    expected, metadata = worker.run(
        KINDS
        + """
model = globals()[kind]()
model.push_to_hub(f"user/{kind}-adapter")
card = ModelCard.load(f"user/{kind}-adapter")
card.validate()
report([answer(model).tolist(), card.data.to_dict()])
""",
        kind=kind,
    )
    assert metadata.get("pipeline_tag") == task
    assert metadata["base_model_relation"] == "adapter"
    found = worker.run(
        KINDS
        + """
made = {}
exec(code, made)
assert type(made["model"]).__module__.startswith("transformers.")
report(answer(made["model"]).tolist())
""",
        code=code_in(card_of(hub, f"user/{kind}-adapter")),
    )
    assert found == expected


def test_the_labels_of_a_new_head_are_told(hub: HubServer, worker: Worker):
    worker.run(KINDS + """classifier().push_to_hub("user/labels")""")
    text = card_of(hub, "user/labels")
    assert 'id2label={0: "good", 1: "bad", 2: "so \\"so\\""}' in text
    assert "| Trained in full | `classifier` |" in text
    assert 'It tells apart: good, bad, so "so".' in text
    assert "model_class" not in text, "the file says what it is for"


def test_several_adapters(hub: HubServer, worker: Worker):
    expected = worker.run("""
        model = adapted()
        for name, seed in (("fr", 2), ("de", 3)):
            hf_lora.add_adapter(model, name, targets="down_proj", r=2)
            stirred(model, seed)
        model.push_to_hub("user/three")
        with hf_lora.use_adapter(model, "de"):
            report(logits(model).tolist())
    """)
    code = code_in(card_of(hub, "user/three"))
    found = worker.run(
        """
        made = {}
        exec(code, made)
        assert hf_lora.active_adapters(made["model"]) == ("de",), code
        assert list(hf_lora.adapters(made["model"])) == ["default", "fr", "de"]
        report(logits(made["model"]).tolist())
        """,
        code=code,
    )
    assert found == expected


def test_only_named_adapters(hub: HubServer, worker: Worker):
    """Nothing lies at the top of the repo: the first is named as well."""
    worker.run("""
        model = AutoModelForCausalLM.from_pretrained("user/base")
        hf_lora.wrap(model, "q_proj", adapter="en", r=2)
        stirred(model)
        model.push_to_hub("user/only-en")
    """)
    assert 'from_pretrained("user/only-en", subfolder="en")' in card_of(hub, "user/only-en")
    worker.run(
        """
        made = {}
        exec(code, made)
        """,
        code=code_in(card_of(hub, "user/only-en")),
    )


def test_no_base_that_others_can_have(hub: HubServer, worker: Worker):
    """The reader brings the model; the card says which, and names no path."""
    expected = worker.run("""
        model = hf_lora.wrap(tiny_model(), ["q_proj", "v_proj"], r=2)
        stirred(model).push_to_hub("user/homeless")
        report(logits(model).tolist())
    """)
    text = card_of(hub, "user/homeless")
    assert "base_model" not in text
    assert "A LoRA adapter for a LlamaForCausalLM" in text
    found = worker.run(
        """
        made = {"model": tiny_model()}
        exec(code, made)
        report(logits(made["model"]).tolist())
        """,
        code=code_in(text),
    )
    assert found == expected


def test_a_stranger_runs_what_the_card_of_a_trainer_says(
    hub: HubServer, worker: Worker, tmp_path: Path
):
    """In a fresh process, without a token or a cache, and with the tokenizer of the adapter."""
    worker.run("""
        from transformers import Trainer, TrainingArguments
        tokenizer = tiny_tokenizer()
        rows = [{"input_ids": [2, 3, 4, 5], "labels": [2, 3, 4, 5]}] * 4
        args = TrainingArguments(
            "out-own", push_to_hub=True, hub_model_id="user/own", max_steps=1, use_cpu=True,
            report_to=[], disable_tqdm=True, hub_strategy="end")
        trainer = Trainer(adapted(), args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.push_to_hub()
    """)
    code = code_in(card_of(hub, "user/own"))
    assert 'AutoTokenizer.from_pretrained("user/own")' in code
    done = run_python(code, hub_environment(hub, tmp_path, token=None))
    assert done.stdout.startswith("Once upon a time "), done
