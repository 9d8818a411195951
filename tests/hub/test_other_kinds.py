"""A full model and an adapter are not pushed into one repo, whichever comes first."""

import pytest

from tests.hub.hub_worker import Worker
from tests.hub_server import HubServer

PUSHES = {
    "push_to_hub": "merged.push_to_hub('user/repo')",
    "save_pretrained": "merged.save_pretrained('full', push_to_hub=True, repo_id='user/repo')",
    "a branch with the adapter": "merged.push_to_hub('user/repo', revision='main')",
}


@pytest.mark.parametrize("push", PUSHES.values(), ids=PUSHES.keys())
def test_a_merged_model_is_not_pushed_into_an_adapters_repo(
    hub: HubServer, worker: Worker, push: str
):
    said, before = worker.run(f"""
        model = adapted()
        hf_lora.push_to_hub(model, "user/repo")
        before = sorted(HfApi().list_repo_files("user/repo"))
        merged = hf_lora.merge_and_unwrap(model)
        report([outcome(lambda: {push}), before])
    """)
    assert said.startswith("HubError: user/repo holds an adapter (adapter_config.json, adapter_mod")
    assert "Push the merged model to another repo; nothing was pushed." in said
    assert sorted(hub.files("user/repo")) == before


def test_it_is_pushed_anywhere_else_as_its_class_does(hub: HubServer, worker: Worker):
    equal = worker.run("""
        model = adapted()
        hf_lora.push_to_hub(model, "user/adapter")
        merged = hf_lora.merge_and_unwrap(model)
        merged.push_to_hub("user/merged")
        merged.push_to_hub("user/merged")
        HfApi().create_branch("user/adapter", branch="other", revision=HfApi().list_repo_commits(
            "user/adapter")[-1].commit_id)
        merged.push_to_hub("user/adapter", revision="other")
        again = AutoModelForCausalLM.from_pretrained("user/merged").eval()
        report(torch.allclose(logits(again), logits(merged), atol=1e-6))
    """)
    assert equal is True
    assert "model.safetensors" in hub.files("user/merged")
    assert "model.safetensors" in hub.files("user/adapter", "other")


def test_a_model_that_was_never_ours_is_not_asked(hub: HubServer, worker: Worker):
    """As transformers does it: its own affair."""
    worker.run("""
        hf_lora.push_to_hub(adapted(), "user/repo")
        AutoModelForCausalLM.from_pretrained("user/base").push_to_hub("user/repo")
    """)
    assert "model.safetensors" in hub.files("user/repo")


def test_an_adapter_is_not_pushed_into_a_models_repo(hub: HubServer, worker: Worker):
    said = worker.run("""report(outcome(hf_lora.push_to_hub, adapted(), "user/base"))""")
    assert said.startswith("HubError: user/base holds a full model (model.safetensors)")
    assert "adapter_model.safetensors" not in hub.files("user/base")
