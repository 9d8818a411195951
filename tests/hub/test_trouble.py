"""Pushes to a server that dies, stumbles, loses answers or has no Xet: told, and put right."""

from pathlib import Path

from tests.hub.hub_worker import Worker, working
from tests.hub_server import Answer, Die, HubServer, LoseAnswer

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
# The seed makes an adapter of its own: what the server has stored once is never sent again.
PUSH = """report(outcome(hf_lora.push_to_hub, adapted(seed=seed), name))"""


def names(hub: HubServer, repo_id: str) -> set[str]:
    return set(hub.files(repo_id)) - {".gitattributes"}


class TestAServerThatDies:
    def test_in_the_middle_of_the_upload(self, hub: HubServer, worker: Worker):
        """It stays away for the client's own tries too: an error, nothing there, then all of it."""
        hub.fail("PUT", "/lfs/", Die(after_bytes=1000))
        said = worker.run(
            """
            from unittest.mock import patch
            with patch("time.sleep"):  # the client waits between its tries
                report(outcome(hf_lora.push_to_hub, adapted(seed=11), "user/dies"))
            """
        )
        assert said.startswith("HubError: ")
        assert "ush again" in said
        assert names(hub, "user/dies") == set()
        assert not hub.log.commits

        hub.start()
        worker.run(PUSH, name="user/dies", seed=11)
        assert names(hub, "user/dies") == ADAPTER
        assert len(hub.log.commits) == 1
        worker.run("""
            loaded = hf_lora.from_pretrained("user/dies")
            assert torch.equal(logits(loaded), logits(adapted(seed=11)))
        """)

    def test_and_comes_back_while_the_client_tries_again(self, hub: HubServer, worker: Worker):
        hub.fail("PUT", "/lfs/", Die(after_bytes=1000, back_after=0.5))
        url = worker.run(PUSH, name="user/revives", seed=12)
        assert url.startswith("http")
        assert names(hub, "user/revives") == ADAPTER
        assert len(hub.log.commits) == 1

    def test_in_the_middle_of_the_commit(self, hub: HubServer, worker: Worker):
        hub.fail("POST", "/commit/", Die(after_bytes=10))
        said = worker.run(PUSH, name="user/stops", seed=13)
        assert said.startswith("HubError: The connection to the Hub broke during the push to user/")
        assert "what has arrived is not sent twice" in said
        assert names(hub, "user/stops") == set()

        hub.start()
        worker.run(PUSH, name="user/stops", seed=13)
        assert names(hub, "user/stops") == ADAPTER
        assert len(hub.log.commits) == 1
        assert len(hub.log.matching("PUT", "/lfs/")) == 1

    def test_before_anything_was_sent(self, hub: HubServer, worker: Worker):
        hub.add_repo("user/away")
        hub.stop()
        said = worker.run(
            """report(outcome(hf_lora.push_to_hub, adapted(folder), "user/away"))""",
            folder=worker.home / "base",
        )
        assert said.startswith("HubError: The Hub cannot be reached: [Errno 111] Connection refuse")
        assert "Nothing was pushed to user/away" in said


class TestAnswers:
    def test_a_lost_answer_to_the_commit(self, hub: HubServer, worker: Worker):
        """The commit is there, and nobody was told: pushing again finds it and makes no other."""
        hub.fail("POST", "/commit/", LoseAnswer())
        said = worker.run(PUSH, name="user/lost", seed=14)
        assert "if the commit did get through no second one is made" in said
        assert names(hub, "user/lost") == ADAPTER
        url = worker.run(PUSH, name="user/lost", seed=14)
        newest, _ = hub.history("user/lost")
        assert url.endswith(newest.id)

    def test_a_lost_answer_to_a_pull_request(self, hub: HubServer, worker: Worker):
        """Here a second push would open a second one, so the first must be looked for."""
        hub.add_repo("user/lost-pr")
        hub.fail("POST", "/commit/", LoseAnswer())
        said = worker.run("""
            push = hf_lora.push_to_hub
            report(outcome(push, adapted(seed=19), "user/lost-pr", create_pr=True))
        """)
        assert "Look whether the pull request is there before you push again" in said
        assert "no second one" not in said
        assert set(hub.files("user/lost-pr", "refs/pr/1")) > ADAPTER

    def test_errors_that_pass_by_themselves(self, hub: HubServer, worker: Worker):
        hub.fail("POST", "/preupload/", 500)
        hub.fail("POST", "/objects/batch", Answer(429, "Slow down", {"Retry-After": "0"}))
        assert worker.run(PUSH, name="user/passing", seed=15).startswith("http")
        assert names(hub, "user/passing") == ADAPTER

    def test_errors_that_do_not(self, hub: HubServer, worker: Worker):
        """One line each, with the server's own words and what to do; the model is as it was."""
        expected = {
            ("/validate-yaml", 503): "The Hub failed on user/status, HTTP 503",
            ("/commit/", 500): "The Hub failed on user/status, HTTP 500",
            ("/commit/", 412): "somebody else pushed at the same moment; push again.",
            ("/commit/", 413): "it is too large for that server.",
            ("/commit/", 429): "too many requests; wait a minute and try again.",
            ("/commit/", 403): "Your token may not do this on user/status, HTTP 403 (No.)",
            ("/repos/create", 500): "The Hub failed on user/status, HTTP 500",
        }
        hub.add_repo("user/status")
        for (path, status), words in expected.items():
            hub.fail("POST", path, Answer(status, "No."))
            said = worker.run(PUSH, name="user/status", seed=16)
            assert said.startswith("HubError: "), (path, status)
            assert words in said, (path, status)
            assert "\n" not in said
        assert worker.run(PUSH, name="user/status", seed=16).startswith("http")
        assert len(hub.log.commits) == 1


def test_a_server_without_xet(hub: HubServer, worker: Worker, tmp_path: Path):
    """The client has no way back to LFS; the reader must know the variable that makes one."""
    cache = {"HF_HUB_CACHE": str(worker.home / "huggingface" / "hub")}
    with working(hub, tmp_path / "xet", xet=True, **cache) as other:
        said = other.run(PUSH, name="user/xet", seed=17)
        assert said == (
            "HubError: The server keeps no Xet storage, which is how the client uploads to "
            "user/xet. Set HF_HUB_DISABLE_XET=1 in the environment before Python starts, and push "
            "again."
        )
        assert not hub.log.commits
        # reading needs no Xet
        other.run("""hf_lora.from_pretrained(name)""", name=_pushed(worker, "user/no-xet"))


def _pushed(worker: Worker, name: str) -> str:
    worker.run(PUSH, name=name, seed=18)
    return name
