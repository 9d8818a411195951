"""Loading from the Hub: by id, revision, subfolder; from repos that are closed, absent, wrong."""

import json
from pathlib import Path

import pytest

from tests.hub.hub_worker import Worker, working
from tests.hub_server import OTHER, READ, CutDownload, HubServer


class TestWhereItIs:
    def test_every_way_to_name_a_revision(self, hub: HubServer, worker: Worker):
        """Four versions, each found under its name, and each another."""
        commit = worker.run("""
            model = adapted()
            hf_lora.push_to_hub(model, "user/many")
            first = HfApi().model_info("user/many").sha
            HfApi().create_tag("user/many", tag="v1")
            hf_lora.push_to_hub(stirred(model, 2), "user/many", revision="trial")
            hf_lora.push_to_hub(stirred(model, 3), "user/many", create_pr=True)
            hf_lora.push_to_hub(stirred(model, 4), "user/many")
            report(first)
        """)
        found = worker.run(
            """
            revisions = [None, "main", "v1", commit, "trial", "refs/pr/1"]
            found = {}
            for revision in revisions:
                loaded = hf_lora.from_pretrained("user/many", revision=revision)
                onto = hf_lora.load(
                    AutoModelForCausalLM.from_pretrained("user/base"), "user/many",
                    revision=revision)
                assert torch.equal(logits(loaded), logits(onto)), revision
                found[str(revision)] = logits(loaded).sum().item()
            report(found)
            """,
            commit=commit,
        )
        assert found["None"] == found["main"]
        assert found["v1"] == found[commit]
        assert len(set(found.values())) == 4

    def test_what_was_pushed_comes_back(self, hub: HubServer, worker: Worker):
        worker.run("""
            model = adapted()
            hf_lora.add_adapter(model, "fr", targets="down_proj", r=2)
            stirred(model, 2)
            hf_lora.push_to_hub(model, "user/back")

            back = hf_lora.from_pretrained("user/back")
            hf_lora.load(back, "user/back", subfolder="fr", adapter="fr")
            for names in ("default", "fr", ["default", "fr"]):
                with hf_lora.use_adapter(model, names), hf_lora.use_adapter(back, names):
                    assert torch.equal(logits(model), logits(back)), names
            alone = hf_lora.from_pretrained("user/back", subfolder="fr")
            with hf_lora.use_adapter(model, "fr"):
                assert torch.equal(logits(model), logits(alone))
            back.load_adapter("user/back", "again", subfolder="fr")
            assert back.active_adapters() == ["again"]
            assert torch.equal(logits(alone), logits(back))
        """)

    def test_both_files_are_of_one_commit(self, hub: HubServer, worker: Worker):
        """Somebody pushes between the two downloads: what is loaded is still one version."""
        worker.run("""hf_lora.push_to_hub(adapted(r=4), "user/moving")""")
        found = worker.run("""
            from hf_lora.hub import download as hub
            download = hub.hf_hub_download
            def overtaken(repo_id, name, **kwargs):
                path = download(repo_id, name, **kwargs)
                if name.endswith("adapter_config.json"):
                    hf_lora.push_to_hub(adapted(r=8), "user/moving")
                return path
            hub.hf_hub_download = overtaken
            try:
                model = hf_lora.from_pretrained("user/moving")
            finally:
                hub.hf_hub_download = download
            report([hf_lora.adapters(model)["default"].r,
                    hf_lora.adapters(hf_lora.from_pretrained("user/moving"))["default"].r])
        """)
        assert found == [4, 8]

    def test_only_the_adapter_is_fetched(self, hub: HubServer, worker: Worker):
        worker.run("""
            hf_lora.push_to_hub(adapted(), "user/few")
            base = AutoModelForCausalLM.from_pretrained("user/base")
        """)
        hub.add_commit("user/few", {"training_args.bin": b"pickle", "optimizer.pt": b"pickle"})
        hub.log.clear()
        code = """
            base = AutoModelForCausalLM.from_pretrained(folder)
            hf_lora.load(base, "user/few")
        """
        worker.run(code, folder=worker.home / "base")
        commit = hub.history("user/few")[0].id
        assert [e.path for e in hub.log.matching("HEAD")] == [
            "/user/few/resolve/main/adapter_config.json",
            f"/user/few/resolve/{commit}/adapter_model.safetensors",
        ]
        assert len(hub.log.matching("GET")) == 2
        hub.log.clear()
        worker.run(code, folder=worker.home / "base")
        assert not hub.log.matching("GET"), "what is cached is not fetched again"

    def test_a_folder_never_touches_the_network(self, hub: HubServer, worker: Worker):
        said = worker.run(
            """
            hf_lora.save(hf_lora.wrap(AutoModelForCausalLM.from_pretrained(folder)), "user/few")
            hf_lora.load(AutoModelForCausalLM.from_pretrained(folder), "user/few")
            hf_lora.from_pretrained("user/few")
            base = AutoModelForCausalLM.from_pretrained(folder)
            report([
                outcome(hf_lora.load, base, Path("user/nowhere")),
                outcome(hf_lora.load, base, "/nowhere/at/all"),
                outcome(hf_lora.load, base, "./user/nowhere"),
                outcome(hf_lora.load, base, "user/few", subfolder="../other"),
                outcome(hf_lora.load, base, "user/absent", subfolder="/etc"),
            ])
            """,
            folder=worker.home / "base",
        )
        assert len(hub.log) == 0
        assert all(text.startswith("AdapterFileError: ") for text in said)
        worker.run("""shutil.rmtree("user")""")

    def test_pull_leaves_a_folder_that_loads(self, hub: HubServer, worker: Worker):
        folder = worker.home / "pulled"
        worker.run(
            """
            from hf_lora.hub.download import pull
            model = adapted()
            hf_lora.add_adapter(model, "fr", targets="down_proj", r=2)
            hf_lora.push_to_hub(model, "user/pulled")
            pull("user/pulled", Path(folder))
            pull("user/pulled", Path(folder) / "fr", subfolder="fr")
            pull("user/pulled", Path(folder) / "fr", subfolder="fr")
            assert torch.equal(logits(hf_lora.from_pretrained(folder)), logits(model))
            """,
            folder=folder,
        )
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert files == {
            f"{at}{name}"
            for at in ("", "fr/")
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        assert not any(path.is_symlink() for path in folder.rglob("*"))

    def test_a_pull_that_fails_leaves_what_was_there(self, hub: HubServer, worker: Worker):
        folder = worker.home / "kept"
        worker.run("""hf_lora.save(adapted(), folder)""", folder=folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        weights = before["adapter_model.safetensors"]
        hub.add_repo("user/broken", {**before, "adapter_model.safetensors": weights[:-8]})
        said = worker.run(
            """
            from hf_lora.hub.download import pull
            report([outcome(pull, name, Path(folder)) for name in ("user/broken", "user/absent")])
            """,
            folder=folder,
        )
        assert [text.partition(":")[0] for text in said] == ["AdapterFileError", "HubError"]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_transformers_own_way_after_the_opt_in(self, hub: HubServer, worker: Worker):
        worker.run("""
            model = adapted()
            hf_lora.push_to_hub(model, "user/auto")
            hf_lora.push_to_hub(stirred(model, 2), "user/auto", revision="trial")
            hf_lora.enable_auto()
            try:
                plain = AutoModelForCausalLM.from_pretrained("user/auto")
                # transformers takes revision= for that of the base as well
                trial = AutoModelForCausalLM.from_pretrained(
                    "user/auto", adapter_kwargs={"revision": "trial"})
            finally:
                hf_lora.disable_auto()
            assert type(plain) is type(trial) is LlamaForCausalLM
            assert torch.equal(logits(plain), logits(adapted()))
            assert torch.equal(logits(trial), logits(model))
        """)


class TestWhoMayRead:
    def test_a_private_repo(self, hub: HubServer, worker: Worker):
        worker.run("""hf_lora.push_to_hub(adapted(), "user/secret", private=True)""")
        said = worker.run(
            """
            def load(**kwargs):
                # a cache of its own: what was fetched once is there for everybody on the machine
                from huggingface_hub import constants
                home, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, f"cache-{len(found)}"
                try:
                    base = AutoModelForCausalLM.from_pretrained(folder)
                    return type(hf_lora.load(base, "user/secret", **kwargs)).__name__
                finally:
                    constants.HF_HUB_CACHE = home
            found = []
            for token in (None, reader, False, stranger, "hf_wrong"):
                found.append(outcome(load, token=token))
            report(found)
            """,
            folder=worker.home / "base",
            reader=READ.value,
            stranger=OTHER.value,
        )
        assert said[:2] == ["LlamaForCausalLM"] * 2
        for text in said[2:4]:
            assert text.startswith("HubError: There is no folder 'user/secret' here, and no such")
        assert "Your token may not do this on user/secret, HTTP 401" in said[4]
        assert all("`hf auth login`, or pass token=" in text for text in said[2:])

    def test_a_gated_repo(self, hub: HubServer, worker: Worker):
        hub.add_repo("user/gated", {"adapter_config.json": "{}"}, gated=True)
        said = worker.run(
            """report(outcome(hf_lora.load, tiny_model(), "user/gated", token=stranger))""",
            stranger=OTHER.value,
        )
        assert said.startswith("HubError: user/gated is gated: ask for access on its page")


class TestWhatIsNoAdapter:
    REPOS = {
        "model": {"config.json": "{}", "model.safetensors": b"0"},
        "pickle": {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.bin": b"\x80"},
        "inside": {"a/adapter_config.json": "{}", "a/adapter_model.safetensors": b"0"},
        "other": {"notes.txt": "words"},
    }

    @pytest.mark.parametrize(
        ("repo", "words"),
        [
            ("model", "It holds a whole model: load that with transformers"),
            ("pickle", "It has 'adapter_model.bin', a pickle, which can run code when it is read"),
            ("inside", "Its folders hold adapters; pass subfolder= one of: 'a'"),
            ("other", "It has: '.gitattributes', 'notes.txt'"),
        ],
    )
    def test_the_error_says_what_it_is(self, hub: HubServer, worker: Worker, repo: str, words: str):
        hub.add_repo(f"user/no-{repo}", self.REPOS[repo])
        said = worker.run(
            """report(outcome(hf_lora.load, tiny_model(), name))""", name=f"user/no-{repo}"
        )
        assert said.startswith(f"AdapterFileError: user/no-{repo} has no adapter_")
        assert words in said
        assert not [e for e in hub.log.matching("GET") if e.path.endswith(".bin")]

    def test_a_revision_or_folder_that_is_not_there(self, hub: HubServer, worker: Worker):
        said = worker.run("""
            model = adapted()
            hf_lora.push_to_hub(model, "user/v0")
            report([outcome(hf_lora.from_pretrained, "user/v0", revision="v9"),
                    outcome(hf_lora.from_pretrained, "user/v0", subfolder="fr"),
                    outcome(hf_lora.from_pretrained, "user/nowhere"),
                    outcome(hf_lora.from_pretrained, "user/no where")])
        """)
        assert said[0].startswith("HubError: user/v0 has no revision 'v9'; give a branch, a tag,")
        assert said[1].startswith("AdapterFileError: user/v0/fr has no adapter_config.json")
        assert said[2].startswith("HubError: There is no folder 'user/nowhere' here, and no such")
        assert said[3] == (
            "AdapterFileError: 'user/no where' is neither a folder nor a repo id on the Hub"
        )

    def test_a_hostile_adapter_leaves_the_model_alone(self, hub: HubServer, worker: Worker):
        folder = worker.home / "sound"
        worker.run("""hf_lora.save(adapted(), folder)""", folder=folder)
        sound = {path.name: path.read_bytes() for path in folder.iterdir()}
        weights, fields = sound["adapter_model.safetensors"], sound["adapter_config.json"]
        faults = {
            "truncated": {"adapter_model.safetensors": weights[: len(weights) // 2]},
            "lying": {"adapter_model.safetensors": (2**40).to_bytes(8, "little") + weights[8:]},
            "flipped": {"adapter_model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])},
            "empty": {"adapter_model.safetensors": b""},
            "listed": {"adapter_config.json": b"[]"},
            "contradicting": {"adapter_config.json": fields.replace(b'"r": 4', b'"r": 5')},
            "pickled": {"adapter_model.safetensors": b"\x80\x04N."},
        }
        for name, fault in faults.items():
            hub.add_repo(f"user/{name}", {**sound, **fault})
        said = worker.run(
            """
            model = tiny_model()
            before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
            said = {name: outcome(hf_lora.load, model, f"user/{name}") for name in names}
            after = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
            assert before == after
            assert outcome(hf_lora.unwrap, model).startswith("StateError")
            report(said)
            """,
            names=list(faults),
        )
        assert {n: t.partition(":")[0] for n, t in said.items()} == dict.fromkeys(
            faults, "AdapterFileError"
        )


class TestWithoutTheHub:
    def test_a_cut_download_is_finished(self, hub: HubServer, worker: Worker):
        worker.run("""hf_lora.push_to_hub(adapted(), "user/cut")""")
        hub.fail("GET", "/storage/", CutDownload(after_bytes=1000))
        worker.run("""
            assert torch.equal(logits(hf_lora.from_pretrained("user/cut")), logits(adapted()))
        """)

    def test_what_is_cached_is_used_while_the_hub_is_down(self, hub: HubServer, worker: Worker):
        worker.run("""
            hf_lora.push_to_hub(adapted(), "user/down")
            hf_lora.from_pretrained("user/down")
        """)
        hub.stop()
        said = worker.run("""
            assert torch.equal(logits(hf_lora.from_pretrained("user/down")), logits(adapted()))
            from unittest.mock import patch
            with patch("time.sleep"):  # the client waits 25 seconds between its tries
                report(outcome(hf_lora.from_pretrained, "user/not-fetched"))
        """)
        assert said.startswith("HubError: user/not-fetched is not in the cache, and it cannot be")
        assert "Connection refused" in said

    def test_offline_mode(self, hub: HubServer, worker: Worker, tmp_path: Path):
        """A process of its own, because the client reads the variable when it is imported."""
        expected = worker.run("""
            model = adapted()
            hf_lora.push_to_hub(model, "user/offline")
            hf_lora.push_to_hub(stirred(model, 2), "user/offline", revision="trial")
            report([logits(hf_lora.from_pretrained("user/offline", revision=r)).tolist()
                    for r in (None, "trial")])
        """)
        hub.log.clear()
        cache = {"HF_HUB_CACHE": str(worker.home / "huggingface" / "hub")}
        with working(hub, tmp_path / "offline", offline=True, **cache) as offline:
            found = offline.run("""
                report([logits(hf_lora.from_pretrained("user/offline", revision=r)).tolist()
                        for r in (None, "trial")])
            """)
            assert found == expected
            said = offline.run("""
                model = hf_lora.from_pretrained("user/offline")
                hf_lora.save(model, "here")
                report([outcome(hf_lora.from_pretrained, "user/never"),
                        outcome(hf_lora.from_pretrained, "user/offline", revision="never"),
                        outcome(hf_lora.push_to_hub, model, "user/offline")])
            """)
        assert len(hub.log) == 0
        assert said[0].startswith("HubError: user/never is not in the cache, and HF_HUB_OFFLINE is")
        assert said[1].startswith("HubError: user/offline at never is not in the cache")
        assert said[2] == (
            "HubError: user/offline cannot be pushed to while HF_HUB_OFFLINE is set; unset it."
        )


def test_the_seeded_base_is_what_the_adapters_name(hub: HubServer, worker: Worker):
    worker.run("""hf_lora.push_to_hub(adapted(), "user/named-base")""")
    fields = json.loads(hub.files("user/named-base")["adapter_config.json"])
    assert fields["base_model_name_or_path"] == "user/base"
