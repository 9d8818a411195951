"""The plain Trainer with push_to_hub=True: every strategy, its card, and what comes back."""

import json
from typing import Any

import pytest

from tests.hub.hub_worker import Worker
from tests.hub_server import HubServer

WEIGHTS = {"adapter_config.json", "adapter_model.safetensors"}
PUSHED = WEIGHTS | {"training_args.bin", "tokenizer.json", "tokenizer_config.json"}
STATES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
STATE = STATES | {"checkpoint_manifest.json"} | PUSHED

TRAINER = """
from transformers import Trainer, TrainingArguments

def rows(count, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(2, 64, (count, 8)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]

def trainer(model, name, **fields):
    settings = dict(
        push_to_hub=True, hub_model_id=f"user/{name}", max_steps=4, save_steps=2, eval_steps=2,
        eval_strategy="steps", logging_steps=2, learning_rate=0.01, seed=3, use_cpu=True,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, hub_always_push=True)
    return Trainer(
        model=model, args=TrainingArguments(output_dir=f"out-{name}", **{**settings, **fields}),
        train_dataset=rows(16), eval_dataset=rows(4, 1), processing_class=tiny_tokenizer())

def tensors(path):
    from safetensors.torch import load_file
    return load_file(path)
"""


def names(hub: HubServer, repo_id: str) -> set[str]:
    return set(hub.files(repo_id)) - {".gitattributes"}


def below(folder: str, files: set[str]) -> set[str]:
    return {f"{folder}/{name}" for name in files}


def run(worker: Worker, code: str, **values: Any) -> Any:
    return worker.run(TRAINER + code, **values)


DURING = {
    "end": set(),
    "every_save": PUSHED,
    "checkpoint": PUSHED | below("last-checkpoint", STATE),
    "all_checkpoints": PUSHED | below("checkpoint-2", STATE) | below("checkpoint-4", STATE),
}


@pytest.mark.parametrize("strategy", DURING)
def test_what_each_strategy_leaves_in_the_repo(hub: HubServer, worker: Worker, strategy: str):
    """Adapter files and nothing of the base, as they stood at the end of the run."""
    name = f"strategy-{strategy}"
    run(
        worker,
        """
t = trainer(adapted(), name, hub_strategy=strategy)
t.train()
t._finish_current_push()
""",
        name=name,
        strategy=strategy,
    )
    assert names(hub, f"user/{name}") == DURING[strategy]
    run(
        worker,
        """
t = trainer(stirred(adapted(), 5), name, hub_strategy=strategy, max_steps=1)
hf_lora.save(t.model, "expected")
t.push_to_hub()
pushed = HfApi().hf_hub_download(f"user/{name}", "adapter_model.safetensors")
assert Path(pushed).read_bytes() == Path("expected/adapter_model.safetensors").read_bytes()
assert torch.equal(logits(hf_lora.from_pretrained(f"user/{name}")), logits(t.model.eval()))
""",
        name=name,
        strategy=strategy,
    )
    assert names(hub, f"user/{name}") == DURING[strategy] | PUSHED | {"README.md"}
    assert not any(
        "model.safetensors" in n for n in names(hub, f"user/{name}") if "adapter" not in n
    )


def test_the_last_checkpoint_can_be_pulled_and_resumed(hub: HubServer, worker: Worker):
    """To the bit: 2 steps, pushed, pulled on a machine that has nothing, 2 more; or 4 at once."""
    run(
        worker,
        """
from huggingface_hub import snapshot_download
whole = trainer(adapted(), "whole", push_to_hub=False)
whole.train()
half = trainer(adapted(), "half", hub_strategy="checkpoint", max_steps=2)
half.train()
half._finish_current_push()
shutil.rmtree("out-half")
pulled = snapshot_download("user/half", allow_patterns="last-checkpoint/*", local_dir="pulled")
rest = trainer(adapted(seed=9), "rest", push_to_hub=False)
rest.train(resume_from_checkpoint="pulled/last-checkpoint")
for (name, one), two in zip(whole.model.named_parameters(), rest.model.parameters()):
    assert torch.equal(one, two), name
assert rest.state.global_step == 4
""",
    )


def test_several_adapters_are_pushed_during_training(hub: HubServer, worker: Worker):
    run(
        worker,
        """
model = adapted()
hf_lora.add_adapter(model, "fr", targets="down_proj", r=2)
t = trainer(model, "two-train", hub_strategy="checkpoint")
t.train()
t._finish_current_push()
""",
    )
    expected = WEIGHTS | below("fr", WEIGHTS)
    assert expected | below("last-checkpoint", expected) <= names(hub, "user/two-train")


class TestTheCard:
    def test_it_survives_and_tells_of_the_run(self, hub: HubServer, worker: Worker):
        text, checked = run(
            worker,
            """
t = trainer(adapted(), "card")
t.train()
results = t.evaluate()
t.push_to_hub()
card = ModelCard.load("user/card")
card.validate()
report([str(card), [results["eval_loss"], card.data.to_dict()]])
""",
        )
        loss, metadata = checked
        assert metadata["base_model"] == "user/base"
        assert metadata["base_model_relation"] == "adapter"
        assert metadata["library_name"] == "peft"
        assert metadata["pipeline_tag"] == "text-generation"
        assert {"hf_lora", "lora"} <= set(metadata["tags"])
        for row in (
            "| Targets | `q_proj` (2), `v_proj` (2) |",
            "| Rank | 4 |",
            "| Alpha | ",
            "| Parameters | 896 |",
            "| Size | 3.5 KiB, float32 |",
            f"| Loss | {loss:.4g} |",
            "| Learning rate | 0.01, constant |",
            "| Batch | 8 (8 per device) |",
            "| Steps | 4 |",
            "| Seed | 3 |",
            "| Mean training loss | ",
            "16 examples to train, 4 to evaluate.",
        ):
            assert row in text, row
        assert "nformation needed" not in text.lower()
        assert "generated_from_trainer" not in text

    def test_what_the_user_says_arrives(self, hub: HubServer, worker: Worker):
        hub.add_repo("user/other-base", {"README.md": "---\nlicense: mit\n---\n"})
        metadata, text = run(
            worker,
            """
t = trainer(adapted(), "said")
t.train()
t.push_to_hub(
    commit_message="Done", language=["en", "fr"], license="apache-2.0", tags=["mine", "too"],
    dataset_tags="user/data", dataset="My data", dataset_args="plain",
    finetuned_from="user/other-base", tasks="text-generation", model_name="A name of my own")
card = ModelCard.load("user/said")
report([card.data.to_dict(), str(card)])
""",
        )
        assert metadata["language"] == ["en", "fr"]
        assert metadata["license"] == "apache-2.0"
        assert {"mine", "too"} <= set(metadata["tags"])
        assert metadata["datasets"] == ["user/data"]
        assert metadata["base_model"] == "user/other-base"
        assert metadata["pipeline_tag"] == "text-generation"
        assert "# A name of my own\n" in text
        assert "[user/data](https://huggingface.co/datasets/user/data): My data, plain, 16" in text
        assert hub.history("user/said")[0].title == "Done"

    def test_the_base_s_licence_is_kept(self, hub: HubServer, worker: Worker):
        folder = worker.home / "base"
        said = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
        hub.add_repo("user/licensed", {"README.md": said}, folder=folder)
        found = run(
            worker,
            """
t = trainer(adapted("user/licensed"), "licensed-by-trainer", max_steps=1)
t.push_to_hub()
hf_lora.push_to_hub(t.model, "user/licensed-by-push")
report([ModelCard.load(f"user/licensed-by-{way}").data.to_dict() for way in ("trainer", "push")])
""",
        )
        for metadata in found:
            assert metadata["license"] == "other"
            assert metadata["license_name"] == "mine"
            assert metadata["license_link"] == "LICENSE"

    def test_results_are_those_of_the_weights_that_are_pushed(self, hub: HubServer, worker: Worker):
        """With load_best_model_at_end the last evaluation may be of other weights."""
        best, text = run(
            worker,
            """
t = trainer(adapted(), "best", load_best_model_at_end=True, max_steps=8, learning_rate=3.0)
t.train()
losses = {e["step"]: e["eval_loss"] for e in t.state.log_history if "eval_loss" in e}
assert t.state.best_global_step != max(losses), losses
t.push_to_hub()
report([losses[t.state.best_global_step], str(ModelCard.load("user/best"))])
""",
        )
        assert f"| Loss | {best:.4g} |" in text

    def test_our_own_push_after_a_training_tells_of_it_too(self, hub: HubServer, worker: Worker):
        """Also of an evaluation that came after, and not if the adapters were trained apart."""
        loss, one, two = run(
            worker,
            """
t = trainer(adapted(), "unused", push_to_hub=False)
t.train()
loss = t.evaluate()["eval_loss"]
hf_lora.push_to_hub(t.model, "user/after")
hf_lora.add_adapter(t.model, "fr", targets="down_proj", r=2)
t.model.push_to_hub("user/after-two")
report([loss, str(ModelCard.load("user/after")), str(ModelCard.load("user/after-two"))])
""",
        )
        assert f"| Loss | {loss:.4g} |" in one
        assert "| Learning rate | 0.01, constant |" in one
        assert "16 examples to train, 4 to evaluate." in one
        assert 'AutoTokenizer.from_pretrained("user/base")' in one
        assert "Learning rate" not in two

    def test_a_run_that_is_not_pushed_asks_nobody(self, hub: HubServer, worker: Worker):
        """TRL writes cards at every checkpoint, also of runs that stay at home."""
        run(
            worker,
            """
t = trainer(adapted(folder), "home", push_to_hub=False, hub_model_id=None)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", hf_lora.HfLoRAWarning)
    t.create_model_card()
assert 'hf_lora.load(model, "out-home")' in Path("out-home/README.md").read_text()
""",
            folder=worker.home / "base",
        )
        assert len(hub.log) == 0

    def test_a_model_that_is_not_ours_gets_the_card_of_transformers(
        self, hub: HubServer, worker: Worker
    ):
        run(
            worker,
            """
t = trainer(AutoModelForCausalLM.from_pretrained("user/base"), "plain", max_steps=1)
t.train()
t.push_to_hub()
""",
        )
        assert "generated_from_trainer" in hub.files("user/plain")["README.md"].decode()
        assert "model.safetensors" in names(hub, "user/plain")
        assert "config.json" in names(hub, "user/plain")


@pytest.mark.parametrize("finetuned_from", [None, "user/base"])
def test_no_path_of_this_machine_is_pushed(
    hub: HubServer, worker: Worker, finetuned_from: str | None
):
    """Neither by the strategies during the run nor at its end; what was said instead is named."""
    name = f"local-{bool(finetuned_from)}"
    folder = worker.home / "base"
    warned = run(
        worker,
        """
def push():
    t = trainer(adapted(folder), name, hub_strategy="checkpoint")
    t.train()
    t._finish_current_push()
    before = {n: f.hex() for n, f in
              ((n, Path(HfApi().hf_hub_download(f"user/{name}", n)).read_bytes()) for n in files)}
    t.push_to_hub(**({"finetuned_from": finetuned_from} if finetuned_from else {}))
    resumed = trainer(adapted(folder, seed=9), name, push_to_hub=False)
    resumed.train(resume_from_checkpoint=True)
    return before
files = ["adapter_config.json", "adapter_model.safetensors", "last-checkpoint/adapter_config.json"]
before, warned = told(push)
assert not any(folder.encode().hex() in content for content in before.values())
report(warned)
""",
        name=name,
        folder=folder,
        finetuned_from=finetuned_from,
    )
    assert any("which nobody else has" in text for text in warned)
    pushed = hub.files(f"user/{name}")
    for file in WEIGHTS | below("last-checkpoint", WEIGHTS) | {"README.md"}:
        assert str(folder).encode() not in pushed[file], file
    fields = json.loads(pushed["adapter_config.json"])
    assert fields["base_model_name_or_path"] == finetuned_from
    assert (b"base_model: user/base" in pushed["README.md"]) == bool(finetuned_from)
    if finetuned_from:
        worker.run("""hf_lora.from_pretrained(name)""", name=f"user/{name}")


def test_the_config_names_the_base(hub: HubServer, worker: Worker):
    run(worker, """trainer(adapted(), "config", max_steps=1).push_to_hub()""")
    fields = json.loads(hub.files("user/config")["adapter_config.json"])
    assert fields["base_model_name_or_path"] == "user/base"
