"""push_to_hub: what lands in the repo, in how many commits, and who is let in."""

import json

from tests.hub.hub_worker import Worker
from tests.hub_server import OTHER, READ, HubServer

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def names(hub: HubServer, repo_id: str, revision: str = "main") -> set[str]:
    return set(hub.files(repo_id, revision)) - {".gitattributes"}


def card(hub: HubServer, repo_id: str, revision: str = "main") -> str:
    return hub.files(repo_id, revision)["README.md"].decode()


class TestWhatLands:
    def test_a_new_repo_gets_adapter_and_card_in_one_commit(self, hub: HubServer, worker: Worker):
        url, saved = worker.run("""
            model = adapted()
            url = hf_lora.push_to_hub(model, "user/new")
            hf_lora.save(model, "here")
            report([url, Path("here/adapter_model.safetensors").read_bytes().hex()])
        """)
        assert names(hub, "user/new") == ADAPTER
        assert len(hub.log.commits) == 1
        newest, first = hub.history("user/new")
        assert url == f"{hub.url}/user/new/commit/{newest.id}"
        assert newest.title == "Upload default with hf_lora"
        assert set(first.files) == {".gitattributes"}
        assert hub.files("user/new")["adapter_model.safetensors"].hex() == saved
        assert not hub.repository("user/new").private
        fields = json.loads(hub.files("user/new")["adapter_config.json"])
        assert fields["base_model_name_or_path"] == "user/base"

    def test_the_instance_method_does_the_same(self, hub: HubServer, worker: Worker):
        worker.run("""
            model = adapted()
            hf_lora.push_to_hub(model, "user/function")
            model.push_to_hub("user/function2", commit_message="Mine", commit_description="Why",
                              tags=["mine"], max_shard_size="1GB", private=True)
        """)
        ours, method = hub.files("user/function"), hub.files("user/function2")
        for name in ADAPTER - {"README.md"}:
            assert ours[name] == method[name]
        assert len(hub.log.commits) == 2
        newest = hub.history("user/function2")[0]
        assert (newest.title, newest.description) == ("Mine", "Why")
        assert "- mine\n" in card(hub, "user/function2")
        assert hub.repository("user/function2").private

    def test_a_name_without_a_user_is_a_repo_of_ones_own(self, hub: HubServer, worker: Worker):
        worker.run("""hf_lora.push_to_hub(adapted(), "bare")""")
        assert names(hub, "user/bare") == ADAPTER
        assert 'from_pretrained("user/bare")' in card(hub, "user/bare")

    def test_a_folder_pushed_without_a_user_has_a_card_that_names_one(
        self, hub: HubServer, worker: Worker
    ):
        worker.run("""
            from hf_lora.hub.push_folder import push_adapter_folder
            adapted().save_pretrained("to-push")
            pushed = push_adapter_folder(Path("to-push"), "bare-folder")
            assert set(pushed.files) == {
                "README.md", "adapter_config.json", "adapter_model.safetensors"}, pushed
            hf_lora.from_pretrained("user/bare-folder")
        """)
        assert names(hub, "user/bare-folder") == ADAPTER
        assert 'from_pretrained("user/bare-folder")' in card(hub, "user/bare-folder")
        assert "# bare-folder\n" in card(hub, "user/bare-folder")

    def test_save_pretrained_can_push(self, hub: HubServer, worker: Worker):
        worker.run("""adapted().save_pretrained("saved", push_to_hub=True, repo_id="user/saved")""")
        assert names(hub, "user/saved") == ADAPTER

    def test_the_type_can_be_chosen(self, hub: HubServer, worker: Worker):
        dtypes = worker.run("""
            from safetensors.torch import load
            model = adapted()
            hf_lora.push_to_hub(model, "user/half", dtype="bfloat16")
            path = HfApi().hf_hub_download("user/half", "adapter_model.safetensors")
            tensors = load(Path(path).read_bytes())
            report([sorted({str(t.dtype) for t in tensors.values()}),
                    sorted({str(p.dtype) for n, p in model.named_parameters() if p.requires_grad})])
        """)
        assert dtypes == [["torch.bfloat16"], ["torch.float32"]]
        assert "bfloat16" in card(hub, "user/half")

    def test_several_adapters(self, hub: HubServer, worker: Worker):
        worker.run("""
            model = adapted()
            hf_lora.add_adapter(model, "fr", targets="down_proj", r=2)
            hf_lora.push_to_hub(model, "user/two")
        """)
        folder = {"fr/adapter_config.json", "fr/adapter_model.safetensors"}
        assert names(hub, "user/two") == ADAPTER | folder
        assert len(hub.log.commits) == 1
        text = card(hub, "user/two")
        assert "2 LoRA adapters" in text
        assert "| `default` | `q_proj` (2), `v_proj` (2) |" in text
        assert "| `fr` | `down_proj` (2) |" in text

    def test_one_adapter_of_several_leaves_the_others_alone(self, hub: HubServer, worker: Worker):
        worker.run("""
            model = adapted()
            hf_lora.push_to_hub(model, "user/one")
            hf_lora.add_adapter(model, "fr", targets="down_proj", r=2)
            hf_lora.push_to_hub(model, "user/one", adapter="fr")
            other = hf_lora.wrap(tiny_model(), "o_proj", r=2, adapter="de")
            other.config._name_or_path = "user/base"
            hf_lora.push_to_hub(other, "user/one")
        """)
        assert len(hub.history("user/one")) == 4
        assert {"adapter_model.safetensors", "fr/adapter_model.safetensors"} < names(
            hub, "user/one"
        )
        second = hub.files("user/one", hub.history("user/one")[1].id)["README.md"].decode()
        assert "| `default` |" in second
        assert "| `fr` |" in second
        assert "`default`, `fr`. Load one with `subfolder=`" in card(hub, "user/one")

    def test_checkpoints_in_the_repo_are_no_adapters(self, hub: HubServer, worker: Worker):
        folders = ("checkpoint-2", "last-checkpoint", "fr")
        weights = {f"{folder}/adapter_model.safetensors": b"0" for folder in folders}
        hub.add_repo("user/with-checkpoints", weights)
        worker.run("""hf_lora.push_to_hub(adapted(), "user/with-checkpoints")""")
        assert "other adapters too: `fr`. Load" in card(hub, "user/with-checkpoints")

    def test_an_unknown_adapter_reaches_nobody(self, hub: HubServer, worker: Worker):
        said = worker.run("""
            report([outcome(hf_lora.push_to_hub, adapted("user/base"), "user/x", adapter="fr"),
                    outcome(hf_lora.push_to_hub, tiny_model(), "user/x"),
                    outcome(hf_lora.push_to_hub, adapted(), "user/x", dtype="int8")])
        """)
        assert [text.split(":")[0] for text in said] == [
            "UnknownAdapterError",
            "StateError",
            "ConfigError",
        ]
        assert not hub.log.matching("POST")


class TestCommits:
    def test_an_unchanged_push_makes_no_commit(self, hub: HubServer, worker: Worker):
        first, second, third = worker.run("""
            model = adapted()
            urls = [hf_lora.push_to_hub(model, "user/again") for _ in range(2)]
            urls.append(hf_lora.push_to_hub(stirred(model, 2), "user/again"))
            report(urls)
        """)
        assert first == second != third
        assert len(hub.history("user/again")) == 3

    def test_a_branch_is_made_when_it_is_needed(self, hub: HubServer, worker: Worker):
        worker.run("""
            model = adapted()
            for seed in (2, 3):
                hf_lora.push_to_hub(stirred(model, seed), "user/branch", revision="trial/one")
        """)
        assert names(hub, "user/branch") == set()
        assert names(hub, "user/branch", "trial/one") == ADAPTER
        assert len(hub.history("user/branch", "trial/one")) == 3
        assert len(hub.log.matching("POST", "/branch/branch/")) == 1

    def test_a_pull_request(self, hub: HubServer, worker: Worker):
        hub.add_repo("user/pr", {"note.txt": "here before"})
        url, again = worker.run("""
            model = adapted()
            url = hf_lora.push_to_hub(model, "user/pr", create_pr=True, commit_message="Please")
            stirred(model, 2)
            report([url, hf_lora.push_to_hub(model, "user/pr", revision="refs/pr/1")])
        """)
        assert url == f"{hub.url}/user/pr/discussions/1"
        assert names(hub, "user/pr") == {"note.txt"}
        assert names(hub, "user/pr", "refs/pr/1") == ADAPTER | {"note.txt"}
        assert again.endswith(hub.history("user/pr", "refs/pr/1")[0].id)
        assert not hub.log.matching("POST", "/user/pr/branch/")

    def test_a_pull_request_is_against_main(self, hub: HubServer, worker: Worker):
        said = worker.run("""
            report(outcome(hf_lora.push_to_hub, adapted(), "user/pr", revision="b", create_pr=True))
        """)
        assert said.startswith("ConfigError: create_pr=True opens a pull request against main")
        assert not hub.log.matching("POST")
        worker.run("""
            model = adapted()
            hf_lora.push_to_hub(model, "user/pr-main", revision="main", create_pr=True)
        """)
        assert names(hub, "user/pr-main", "refs/pr/1") == ADAPTER

    def test_a_pull_request_to_somebody_else(self, hub: HubServer, worker: Worker):
        hub.add_repo("user/wanted")
        worker.run(
            """hf_lora.push_to_hub(adapted(), "user/wanted", create_pr=True, token=stranger)""",
            stranger=OTHER.value,
        )
        assert names(hub, "user/wanted", "refs/pr/1") == ADAPTER
        assert names(hub, "user/wanted") == set()

    def test_an_existing_repo_keeps_its_visibility(self, hub: HubServer, worker: Worker):
        hub.add_repo("user/closed", private=True)
        hub.add_repo("user/open")
        said = worker.run("""
            model = adapted()
            hf_lora.push_to_hub(model, "user/closed", private=False)
            report(outcome(hf_lora.push_to_hub, model, "user/open", private=True))
        """)
        assert hub.repository("user/closed").private
        assert names(hub, "user/closed") == ADAPTER
        # what was meant to stay private must not go where everybody sees it
        assert said.startswith("HubError: user/open exists and is public, and private=True cannot")
        assert names(hub, "user/open") == set()


class TestCardsOfOthers:
    def test_a_card_that_somebody_edited_is_kept(self, hub: HubServer, worker: Worker):
        worker.run("""hf_lora.push_to_hub(adapted(), "user/edited")""")
        mine = card(hub, "user/edited").replace("\n## Use it", "\nDo not use it.\n\n## Use it")
        hub.add_commit("user/edited", {"README.md": mine})
        _, warned = worker.run("""
            report(told(hf_lora.push_to_hub, adapted(seed=2), "user/edited"))
        """)
        assert card(hub, "user/edited") == mine
        assert len(hub.history("user/edited")) == 4
        assert len(warned) == 1
        assert warned[0].startswith("The model card of user/edited was not written by hf_lora")

    def test_a_card_that_the_user_brings_replaces_any(self, hub: HubServer, worker: Worker):
        hub.add_repo("user/brought", {"README.md": "# Theirs\n"})
        _, warned = worker.run("""
            from hf_lora.hub.upload import push_folder
            hf_lora.save(adapted(), "brought")
            Path("brought/README.md").write_text("# Mine\\n")
            report(told(push_folder, Path("brought"), "user/brought", commit_message="Mine"))
        """)
        assert card(hub, "user/brought") == "# Mine\n"
        assert warned == []

    def test_our_own_card_is_kept_up_to_date(self, hub: HubServer, worker: Worker):
        _, warned = worker.run("""
            hf_lora.push_to_hub(adapted(r=4), "user/fresh")
            report(told(hf_lora.push_to_hub, adapted(r=8), "user/fresh"))
        """)
        assert "| Rank | 8 |" in card(hub, "user/fresh")
        assert warned == []

    def test_metadata_that_the_hub_refuses(self, hub: HubServer, worker: Worker):
        said = worker.run("""
            report(outcome(adapted().push_to_hub, "user/tags", tags=[3]))
        """)
        assert said == (
            "HubError: The Hub refuses the model card's metadata. "
            'Invalid metadata in README.md. - "tags[3]" must be a string'
        )
        assert names(hub, "user/tags") == set()


class TestLocalBase:
    def test_no_path_of_this_machine_is_pushed(self, hub: HubServer, worker: Worker):
        folder = worker.home / "base"
        (_, warned), secret = worker.run(
            """
            model = adapted(folder)
            report([told(hf_lora.push_to_hub, model, "user/local"), folder])
            """,
            folder=folder,
        )
        assert len(warned) == 1
        assert "which nobody else has" in warned[0]
        assert "model.config._name_or_path" in warned[0]
        for name, content in hub.files("user/local").items():
            assert secret.encode() not in content, name
        fields = json.loads(hub.files("user/local")["adapter_config.json"])
        assert fields["base_model_name_or_path"] is None

    def test_the_warning_s_advice_works(self, hub: HubServer, worker: Worker):
        _, warned = worker.run(
            """
            model = adapted(folder)
            model.config._name_or_path = "user/base"
            report(told(hf_lora.push_to_hub, model, "user/named"))
            """,
            folder=worker.home / "base",
        )
        assert warned == []
        assert "base_model: user/base\n" in card(hub, "user/named")

    def test_a_folder_of_the_cache_is_the_repo_it_came_from(self, hub: HubServer, worker: Worker):
        _, warned = worker.run("""
            from huggingface_hub import snapshot_download
            model = adapted(snapshot_download("user/base"))
            report(told(hf_lora.push_to_hub, model, "user/snapshot"))
        """)
        assert warned == []
        fields = json.loads(hub.files("user/snapshot")["adapter_config.json"])
        assert fields["base_model_name_or_path"] == "user/base"


class TestRefusals:
    def test_who_may_not_write_is_told_so(self, hub: HubServer, worker: Worker):
        hub.add_repo("user/there")
        code = """
            model = adapted()
            report({
                "reader, new": outcome(hf_lora.push_to_hub, model, "user/absent", token=reader),
                "reader": outcome(hf_lora.push_to_hub, model, "user/there", token=reader),
                "stranger": outcome(hf_lora.push_to_hub, model, "user/there", token=stranger),
                "stranger, new": outcome(hf_lora.push_to_hub, model, "user/no", token=stranger),
                "nobody": outcome(hf_lora.push_to_hub, model, "user/there", token=False),
                "typo": outcome(hf_lora.push_to_hub, model, "user/there", token="hf_wrong"),
            })
        """
        said = worker.run(code, reader=READ.value, stranger=OTHER.value)
        for who, text in said.items():
            assert text.startswith("HubError: "), who
            assert "`hf auth login`, or pass token=" in text, who
            assert "\n" not in text, who
        assert names(hub, "user/there") == set()
        assert "user/absent" not in hub.hub.repositories

    def test_what_is_no_repo_id(self, hub: HubServer, worker: Worker):
        said = worker.run("""
            model = adapted()
            report([outcome(hf_lora.push_to_hub, model, name) for name in ("a/b/c", "a b", "")])
        """)
        assert all(text.startswith("HubError: '") for text in said)
        assert all("is no repo id such as 'user/name'" in text for text in said)
        assert not hub.log.matching("POST")
