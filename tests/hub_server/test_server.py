"""The server against the real huggingface_hub: accounts, repositories, references, cards, pulls."""

from pathlib import Path
from typing import Any

import pytest

from . import OTHER, READ, HubServer, Token, hub_environment, run_python
from .calls import FORBIDDEN, NAMES, NOT_FOUND, NOT_FOUND_ANONYMOUS, UNAUTHORIZED, run


def test_a_repository_is_created_once_and_deleted(hub: HubServer, tmp_path: Path):
    script = """
report({
    "urls": [str(api.create_repo("one")), str(api.create_repo("org/two", private=True))],
    "again": outcome(api.create_repo, "user/one"),
    "exist_ok": str(api.create_repo("one", exist_ok=True, private=True)),
    "private": [api.model_info(f).private for f in ("user/one", "org/two")],
    "elsewhere": outcome(api.create_repo, "stranger/one"),
    "gone": [api.delete_repo("org/two"), api.repo_exists("org/two")],
    "missing": outcome(api.delete_repo, "org/two"),
    "missing_ok": api.delete_repo("org/two", missing_ok=True),
    "may_write": api.auth_check("user/one", write=True),
})
"""
    assert run(hub, tmp_path, script) == {
        "urls": [f"{hub.url}/user/one", f"{hub.url}/org/two"],
        "again": ["HfHubHTTPError", 409],
        "exist_ok": f"{hub.url}/user/one",
        "private": [False, True],
        "elsewhere": ["HfHubHTTPError", 403],
        "gone": [None, False],
        "missing": ["RepositoryNotFoundError", 404],
        "missing_ok": None,
        "may_write": None,
    }


@pytest.mark.parametrize(
    ("token", "name", "public", "private", "absent", "gated", "create", "change"),
    [
        pytest.param(READ, "user", "p", "s", NOT_FOUND, "g", FORBIDDEN, FORBIDDEN, id="read-only"),
        pytest.param(
            OTHER,
            "other",
            "p",
            NOT_FOUND,
            NOT_FOUND,
            ["GatedRepoError", 403],
            FORBIDDEN,
            FORBIDDEN,
            id="stranger",
        ),
        pytest.param(
            None,
            ["LocalTokenNotFoundError", None],
            "p",
            NOT_FOUND_ANONYMOUS,
            NOT_FOUND_ANONYMOUS,
            ["GatedRepoError", 401],
            UNAUTHORIZED,
            NOT_FOUND_ANONYMOUS,
            id="no-token",
        ),
        pytest.param(Token("hf_wrong", "nobody"), *[UNAUTHORIZED] * 7, id="wrong-token"),
    ],
)
def test_who_may_do_what(
    hub: HubServer,
    tmp_path: Path,
    token: Token | None,
    name: Any,
    public: Any,
    private: Any,
    absent: Any,
    gated: Any,
    create: Any,
    change: Any,
):
    hub.add_repo("user/public", {"a.txt": "p"})
    hub.add_repo("user/private", {"a.txt": "s"}, private=True)
    hub.add_repo("user/gated", {"a.txt": "g"}, gated=True)
    script = """
report({
    "whoami": outcome(lambda: api.whoami()["name"]),
    "public": outcome(read, "user/public"),
    "private": outcome(read, "user/private"),
    "absent": outcome(read, "user/absent"),
    "gated": outcome(read, "user/gated"),
    "create": outcome(api.create_repo, "user/new"),
    "changes": [
        outcome(put, "user/public", "x", "x"),
        outcome(api.create_branch, "user/public", branch="b"),
        outcome(api.create_tag, "user/public", tag="t"),
        outcome(api.update_repo_settings, "user/public", private=True),
        outcome(api.create_pull_request, "user/private", title="t"),
    ],
})
"""
    found = run(hub, tmp_path, script, token=token)
    # A stranger's pull request fails because the repository is hidden.
    last = NOT_FOUND if token is OTHER else change
    assert found == {
        "whoami": name,
        "public": public,
        "private": private,
        "absent": absent,
        "gated": gated,
        "create": create,
        "changes": [change] * 4 + [last],
    }
    assert len(hub.history("user/public")) == 2
    assert not hub.repository("user/public").private
    users = {exchange.user for exchange in hub.log}
    assert users == {token.user if token and name != UNAUTHORIZED else None}


def test_files_are_found_by_branch_tag_commit_and_cache(hub: HubServer, tmp_path: Path):
    hub.add_repo("user/m", {"a.txt": "one", "w.bin": b"one"})
    script = """
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

first = api.model_info("user/m").sha
api.create_tag("user/m", tag="v1", tag_message="one")
api.create_branch("user/m", branch="feature/x")
put("user/m", "a.txt", "two")
put("user/m", "a.txt", "three", revision="feature/x")
refs = api.list_repo_refs("user/m", include_pull_requests=True)
found = {
    "read": [read("user/m", revision=r) for r in (None, "v1", "feature/x", first, first[:8])],
    "absent": [outcome(read, "user/m", "no.txt"), outcome(read, "user/m", revision="no")],
    "known_absent": try_to_load_from_cache("user/m", "no.txt") is _CACHED_NO_EXIST,
    "exists": [api.file_exists("user/m", f) for f in ("a.txt", "no.txt")],
    "revisions": [api.revision_exists("user/m", r) for r in ("v1", "no")],
    "refs": [[r.name for r in rs] for rs in (refs.branches, refs.tags, refs.pull_requests)],
    "clash": [outcome(api.create_branch, "user/m", branch="feature/x"),
              outcome(api.create_tag, "user/m", tag="v1")],
    "exist_ok": [api.create_branch("user/m", branch="feature/x", exist_ok=True)],
    "deleted": [api.delete_branch("user/m", branch="feature/x"),
                api.delete_tag("user/m", tag="v1")],
    "main": outcome(api.delete_branch, "user/m", branch="main"),
    "to_a_tag": outcome(put, "user/m", "b", "b", revision="v1"),
    "left": [r.name for r in api.list_repo_refs("user/m").branches],
}
report(found)
"""
    assert run(hub, tmp_path, script) == {
        "read": ["two", "one", "three", "one", "one"],
        "absent": [["RemoteEntryNotFoundError", 404], ["RevisionNotFoundError", 404]],
        "known_absent": True,
        "exists": [True, False],
        "revisions": [True, False],
        "refs": [["main", "feature/x"], ["v1"], []],
        "clash": [["HfHubHTTPError", 409]] * 2,
        "exist_ok": [None],
        "deleted": [None, None],
        "main": ["HfHubHTTPError", 403],
        "to_a_tag": ["RevisionNotFoundError", 404],
        "left": ["main"],
    }
    # A second process finds it all in its cache: one look at the branch, no download.
    hub.log.clear()
    assert run(hub, tmp_path, 'report(read("user/m"))') == "two"
    assert [(e.method, e.status) for e in hub.log] == [("HEAD", 200)]
    # And offline it does not even look.
    hub.log.clear()
    offline = hub_environment(hub, tmp_path, offline=True)
    script = 'report([read("user/m"), outcome(read, "user/m", "w.bin")])'
    done = run_python(NAMES + script, offline)
    assert done.value == ["two", ["LocalEntryNotFoundError", None]]
    assert len(hub.log) == 0


def test_pull_requests(hub: HubServer, tmp_path: Path):
    hub.add_repo("user/m", {"a.txt": "a", "b.txt": "b"})
    stranger = """
made = put("user/m", "a.txt", "theirs", create_pr=True, commit_message="Please")
put("user/m", "c.txt", "more", revision="refs/pr/1")
report([made.pr_url, made.pr_revision, made.pr_num, outcome(put, "user/m", "c.txt", "c"),
        outcome(api.merge_pull_request, "user/m", 1)])
"""
    url = f"{hub.url}/user/m/discussions/1"
    assert run(hub, tmp_path, stranger, token=OTHER) == [
        url, "refs/pr/1", 1, FORBIDDEN, FORBIDDEN
    ]  # fmt: skip
    owner = """
empty = api.create_pull_request("user/m", title="Draft", description="later")
put("user/m", "a.txt", "ours", revision=empty.git_reference)
api.comment_discussion("user/m", 2, comment="hello")
api.change_discussion_status("user/m", 2, new_status="open")
api.create_discussion("user/m", title="Question")
found = {
    "before": read("user/m"),
    "there": read("user/m", revision="refs/pr/1"),
    "drafts": [empty.status, empty.git_reference],
    "listed": [[d.num, d.author, d.status, d.is_pull_request]
               for d in api.get_repo_discussions("user/m")],
    "pulls": [d.num for d in api.get_repo_discussions("user/m", discussion_type="pull_request")],
    "refs": [r.ref for r in
             api.list_repo_refs("user/m", include_pull_requests=True).pull_requests],
    "merged": api.merge_pull_request("user/m", 1),
    "after": [read("user/m"), read("user/m", "c.txt")],
    "conflict": outcome(api.merge_pull_request, "user/m", 2),
    "closed": api.change_discussion_status("user/m", 2, new_status="closed").new_status,
}
details = api.get_discussion_details("user/m", 1)
found["details"] = [details.status, [e.type for e in details.events], details.target_branch,
                    details.merge_commit_oid == api.model_info("user/m").sha]
report(found)
"""
    assert run(hub, tmp_path, owner) == {
        "before": "a",
        "there": "theirs",
        "drafts": ["draft", "refs/pr/2"],
        "listed": [
            [3, "user", "open", False],
            [2, "user", "open", True],
            [1, "other", "open", True],
        ],
        "pulls": [2, 1],
        "refs": ["refs/pr/1", "refs/pr/2"],
        "merged": None,
        "after": ["theirs", "more"],
        "conflict": ["HfHubHTTPError", 409],
        "closed": "closed",
        "details": [
            "merged",
            ["comment", "commit", "commit", "status-change"],
            "refs/heads/main",
            True,
        ],
    }
    assert hub.files("user/m")["b.txt"] == b"b"


def test_cards_are_validated_and_read(hub: HubServer, tmp_path: Path):
    good = (
        "---\nbase_model: user/base\nbase_model_relation: adapter\n"
        "library_name: x\ntags: [t]\n---\ntext"
    )
    bad = {
        "folder": "---\nbase_model: /home/me/base\n---\n",
        "relation": "---\nbase_model: user/base\nbase_model_relation: cousin\n---\n",
        "yaml": "---\nbase_model: [\n---\n",
        "index": "---\nmodel-index:\n- results: []\n---\n",
        "tags": "---\ntags: [1]\n---\n",
    }
    script = """
api.create_repo("m")
ModelCard(good).push_to_hub("user/m")
info = api.model_info("user/m")
errors = {}
for name, text in bad.items():
    try:
        put("user/m", "README.md", text)
    except ValueError as error:
        errors[name] = str(error)
report({"tags": info.tags, "card": info.card_data.to_dict(), "library": info.library_name,
        "errors": errors})
"""
    found = run(hub, tmp_path, script, good=good, bad=bad)
    assert found["tags"] == ["x", "t", "base_model:user/base", "base_model:adapter:user/base"]
    assert found["card"]["base_model_relation"] == "adapter"
    assert found["library"] == "x"
    assert set(found["errors"]) == set(bad)
    assert '"base_model" with value "/home/me/base" is not valid' in found["errors"]["folder"]
    assert len(hub.log.commits) == 1
