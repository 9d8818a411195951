"""The server against transformers: models and tokenizers there and back, and Trainer's pushes."""

from pathlib import Path

from . import HubServer, hub_environment, run_python

TINY = """
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import AutoModelForCausalLM, AutoTokenizer

def tiny_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))

def tiny_tokenizer():
    words = {word: i for i, word in enumerate(["<unk>", "<pad>", "hello", "world"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
"""

LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained("user/tiny")("hello world", return_tensors="pt")["input_ids"]
logits = AutoModelForCausalLM.from_pretrained("user/tiny")(ids).logits
"""


def test_a_model_comes_back_as_it_was_pushed(hub: HubServer, tmp_path: Path):
    script = """
model, tokenizer = tiny_model().eval(), tiny_tokenizer()
model.push_to_hub("tiny", private=True, tags=["made-small"])
tokenizer.push_to_hub("tiny")
there = len(list(AutoModelForCausalLM.from_pretrained("user/tiny").parameters()))
model.push_to_hub("user/tiny", create_pr=True)  # the same weights: nothing to commit
"""
    check = """
assert ids.tolist() == [[2, 3]]
assert torch.equal(logits, model(ids).logits)
with torch.no_grad():
    model.lm_head.weight.zero_()
model.push_to_hub("user/tiny", create_pr=True)
pull = AutoModelForCausalLM.from_pretrained("user/tiny", revision="refs/pr/1")
assert not pull.lm_head.weight.any()
main = AutoModelForCausalLM.from_pretrained("user/tiny")
assert main.lm_head.weight.any()

errors = []
for repo, token in (("user/tiny", False), ("user/absent", None)):
    try:
        AutoModelForCausalLM.from_pretrained(repo, token=token)
    except OSError as error:
        errors.append(str(error))
report({"logits": logits.flatten().tolist(), "errors": errors})
"""
    home = tmp_path / "client"
    found = run_python(TINY + script + LOAD + check, hub_environment(hub, home)).value
    files = set(hub.files("user/tiny"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert hub.repository("user/tiny").private
    assert b"made-small" in hub.files("user/tiny")["README.md"]
    assert len(hub.log.commits) == 3  # model, tokenizer, the changed head as a pull request
    assert len(hub.history("user/tiny")) == 3
    assert len(found["errors"]) == 2
    assert all("is not a valid model identifier" in text for text in found["errors"])

    hub.log.clear()
    offline = hub_environment(hub, home, offline=True)
    again = run_python(LOAD + "report(logits.flatten().tolist())", offline)
    assert again.value == found["logits"]
    assert len(hub.log) == 0


def test_the_hub_strategies_of_trainer(hub: HubServer, tmp_path: Path):
    script = """
from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments

def files(repo):
    return sorted(HfApi().list_repo_files(repo))

row = {"input_ids": list(range(8)), "labels": list(range(8))}
found = {}
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    trainer = Trainer(
        model=tiny_model(),
        args=TrainingArguments(
            output_dir=f"out-{strategy}", push_to_hub=True, hub_strategy=strategy,
            hub_model_id=f"user/{strategy}", hub_always_push=True, hub_private_repo=True,
            max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True),
        train_dataset=[row] * 4,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trained = files(trainer.hub_model_id)
    trainer.push_to_hub()
    pushed = AutoModelForCausalLM.from_pretrained(trainer.hub_model_id)
    assert torch.equal(pushed.lm_head.weight, trainer.model.lm_head.weight)
    found[strategy] = [trained, files(trainer.hub_model_id)]
report(found)
"""
    found = run_python(TINY + script, hub_environment(hub, tmp_path)).value
    model = {"config.json", "model.safetensors", "training_args.bin", "tokenizer.json"}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} | model
    during = {
        "end": set(),
        "every_save": model,
        "checkpoint": model | {f"last-checkpoint/{name}" for name in state},
        "all_checkpoints": model | {f"checkpoint-{i}/{name}" for i in (1, 2) for name in state},
    }
    ignored = {"README.md", ".gitattributes", "generation_config.json", "tokenizer_config.json"}
    for strategy, expected in during.items():
        trained, finished = found[strategy]
        shown = {path for path in trained if path.rpartition("/")[2] not in ignored}
        assert shown == expected, strategy
        assert set(finished) >= expected | model | {"README.md"}, strategy
        assert hub.repository(f"user/{strategy}").private
        card = hub.files(f"user/{strategy}")["README.md"].decode()
        assert "generated_from_trainer" in card
