"""``hf-lora push`` and ``pull`` against a Hub on loopback, and what they refuse without one."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import peft
import pytest
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

import hf_lora
from tests import forked
from tests.hub_server import HubServer, hub_environment
from tests.tiny_base import EXAMPLES, Run

# Every call in one process, because importing torch takes longer than all of them together, and in
# a process of its own, because the client reads its endpoint when it is imported.
CALLS = """
import json, sys
from typer.testing import CliRunner
from hf_lora.cli.main import app
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    found[name] = [result.exit_code, result.stdout, result.stderr]
print(json.dumps(found))
"""


def call(hub: HubServer, home: Path, calls: Mapping[str, list]) -> dict[str, tuple]:
    """Run the calls; return exit code, stdout and stderr of each by its name."""
    words = {name: [str(word) for word in arguments] for name, arguments in calls.items()}
    done = forked.run_code(CALLS, json.dumps(words), stage="torch", env=hub_environment(hub, home))
    assert done.returncode == 0, done.stderr
    return {name: tuple(each) for name, each in json.loads(done.stdout.splitlines()[-1]).items()}


@dataclasses.dataclass(frozen=True)
class Scene:
    """What there was before the calls, what they answered, and the Hub after them."""

    hub: HubServer
    folder: Path
    adapter: Path
    before: dict[Path, bytes]
    found: dict[str, tuple]

    def code(self, name: str) -> int:
        return self.found[name][0]

    def json(self, name: str) -> dict:
        return json.loads(self.found[name][1])

    def words(self, name: str) -> str:
        """What it said on stderr, in one line."""
        return " ".join(self.found[name][2].split())

    def files(self, repo: str) -> Mapping[str, bytes]:
        return self.hub.files(repo)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained(base: Path, folder: Path) -> Path:
    """An adapter folder as it lies after training: with checkpoints and other things beside it."""
    model = hf_lora.wrap(AutoModelForCausalLM.from_pretrained(base), ["q_proj"], r=2)
    hf_lora.add_adapter(model, "fr", targets=["v_proj"], r=3)
    hf_lora.save(model, folder)
    hf_lora.save(model, folder / "checkpoint-5", adapter="default")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"secret")
    (folder / ".env").write_text("HF_TOKEN=secret")
    return folder


def made_by_peft(base: Path, folder: Path) -> Path:
    config = peft.LoraConfig(target_modules=["v_proj"], r=2)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(str(folder))
    (folder / "README.md").write_text("# Mine\n")
    return folder


@pytest.fixture(scope="module")
def scene(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("share")
    adapter = trained(base, folder / "adapter")
    before = contents(adapter)
    repo = "user/first"
    settings = [f"base.model={base}", "trainer.max_steps=2", "push.repo_id=user/opposites"]
    recipe = EXAMPLES / "completion.yaml"
    settings = [word for setting in settings for word in ("--set", setting)]
    calls = {
        "push": ["push", adapter, repo, "--private", "--base", "me/base", "-m", "Hello", "--json"],
        "pull": ["pull", repo, folder / "pulled", "--json"],
        "pull again": ["pull", repo, folder / "pulled"],
        "pull over": ["pull", repo, folder / "pulled", "--force", "--subfolder", "fr"],
        "pull named": ["pull", repo, folder / "named", "--subfolder", "fr"],
        "show": ["show", repo, "--json"],
        "propose": ["push", adapter, repo, "--pr", "--json"],
        "pull absent": ["pull", "user/absent", folder / "absent", "--json"],
        "push peft": ["push", made_by_peft(base, folder / "peft"), "user/peft"],
        "train": ["train", recipe, *settings, "-o", folder / "out", "--json"],
        "push trained": ["push", folder / "out", "user/later", "--base", "me/base"],
    }
    with HubServer() as hub:
        yield Scene(hub, folder, adapter, before, call(hub, folder, calls))


def test_every_call_ends_as_it_should(scene: Scene):
    refused = {name for name, (code, *_) in scene.found.items() if code}
    assert refused == {"pull again", "pull absent"}, scene.found
    assert {scene.code(name) for name in refused} == {1}
    assert "--force" in scene.words("pull again")
    assert "user/absent" in scene.json("pull absent")["error"]["message"]
    assert not (scene.folder / "absent").exists()


def test_the_adapters_and_a_card_are_pushed_in_one_commit_and_nothing_else(scene: Scene):
    expected = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "fr/adapter_config.json",
        "fr/adapter_model.safetensors",
        "tokenizer.json",
    }
    assert set(scene.files("user/first")) == {".gitattributes", *expected}
    pushed = scene.json("push")
    assert set(pushed["files"]) == expected
    assert pushed["url"].startswith(scene.hub.url)
    for name in (".env", "checkpoint-5", "optimizer.pt"):
        assert name in scene.words("push")
    assert scene.hub.repository("user/first").private
    # the first commit is the repo's own
    assert scene.hub.history("user/first")[0].title == "Hello"
    assert len(scene.hub.history("user/first")) == 2
    assert contents(scene.adapter) == scene.before


def test_the_base_that_was_a_folder_is_named_as_was_asked(scene: Scene, base: Path):
    files = scene.files("user/first")
    for name in ("adapter_config.json", "fr/adapter_config.json"):
        assert json.loads(files[name])["base_model_name_or_path"] == "me/base"
    assert str(base).encode() not in b"".join(files.values())
    theirs = load(files["adapter_model.safetensors"])
    ours = load_file(scene.adapter / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(theirs[key].equal(ours[key]) for key in ours)
    assert scene.json("show")["base"] == "me/base"


def test_the_card_is_made_from_the_files(scene: Scene):
    card = scene.files("user/first")["README.md"].decode()
    for words in ("base_model: me/base", "library_name: peft", "`q_proj` (2)", "fr"):
        assert words in card, card
    assert 'hf_lora.from_pretrained("user/first")' in card


def test_what_was_pulled_loads(scene: Scene, base: Path):
    assert scene.json("pull") == {
        "folder": str(scene.folder / "pulled"),
        "base": "me/base",
        "layers": 2,
    }
    for name in ("named", "pulled"):  # the second was replaced
        model = AutoModelForCausalLM.from_pretrained(base)
        (adapter,) = hf_lora.summary(hf_lora.load(model, scene.folder / name)).adapters
        assert [path.rsplit(".", 1)[-1] for path in adapter.norms] == ["v_proj"] * 2


def test_a_folder_with_a_card_and_no_base_on_the_hub(scene: Scene):
    """One that PEFT made goes as it is, but for the path of its base."""
    assert "names no base" in scene.words("push peft")
    files = scene.files("user/peft")
    assert files["README.md"] == b"# Mine\n"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    kept = scene.folder / "peft" / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == kept.read_bytes()


def test_a_recipe_that_pushes(scene: Scene):
    assert scene.json("train")["pushed"].startswith(scene.hub.url)
    files = scene.files("user/opposites")
    later = scene.files("user/later")["README.md"].decode()
    assert load(files["adapter_model.safetensors"]).keys() == (
        load_file(scene.folder / "out" / "adapter_model.safetensors").keys()
    )
    card = files["README.md"].decode()
    for words in ("eval_loss", "learning_rate", "0.0005", "32 examples"):
        assert words in card, card
        assert words in later, later
    assert not any("checkpoint" in name or name == "training.json" for name in files)


def test_what_is_no_adapter_is_not_pushed(run: Run, tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "pickle" in run("push", tmp_path, "me/x", code=1).stderr
    assert "is not a folder" in run("push", tmp_path / "absent", "me/x", code=1).stderr


def test_offline_is_told(run: Run, base: Path, tmp_path: Path):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    error = json.loads(
        run("push", trained(base, tmp_path / "adapter"), "me/x", "--json", code=1).stdout
    )["error"]
    assert error["type"] == "HubError"
    assert run("pull", "me/x", tmp_path / "x", code=1).stderr.startswith("error: me/x is not in")
