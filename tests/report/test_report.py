"""``hf-lora report``: figures that are right, in one page that needs nothing else."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_lora
from hf_lora.recipes.history import write_history
from hf_lora.report.facts import collect
from hf_lora.report.page import page
from hf_lora.report.svg import curves
from tests.oracle.adapting import scramble
from tests.tiny_base import Run, tiny_model

VOID = {"meta", "br", "input", "link", "img", "line", "circle"}
NASTY = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """Checks that what is opened is closed, and gathers what a reader sees and what is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not set(self.open) & {"style", "script"}:
            self.seen.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def adapter_of(base: Path, folder: Path, seed: int, **fields: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    hf_lora.wrap(model, **{"targets": "all-linear", "r": 4, **fields})
    scramble(model)
    hf_lora.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    found = [
        adapter_of(base, place / "one", 1),
        adapter_of(base, place / "two", 2, targets=["q_proj", "up_proj"], r=2),
    ]
    rows = [{"step": n, "loss": 3.0 / n} for n in range(1, 9)]
    write_history(found[0], [*rows, {"step": 8, "eval_loss": 0.5}])
    return found


def test_figures_are_those_of_the_update_as_one_matrix(two: list[Path], base: Path):
    (figures,) = collect([str(two[0])]).adapters
    model = hf_lora.load(AutoModelForCausalLM.from_pretrained(base), two[0]).double()
    assert len(figures.layers) == 14
    for layer in figures.layers:
        module: Any = model.get_submodule(layer.path)
        update = module.scaling * (module.lora_B @ module.lora_A)
        values = torch.linalg.svdvals(update)[:4]
        assert layer.values == pytest.approx(values.tolist(), rel=1e-6)
        assert layer.norm == pytest.approx(float(update.norm()), rel=1e-6)
        shares = values / values.sum()
        entropy = -float((shares * shares.log()).sum())
        assert layer.effective_rank == pytest.approx(math.exp(entropy), rel=1e-6)
    assert {layer.number for layer in figures.layers} == {0, 1}
    assert "model.layers.*.self_attn.q_proj" in {layer.kind for layer in figures.layers}


def test_norms_over_those_of_the_base(two: list[Path], base: Path):
    (figures,) = collect([str(two[0])], base=str(base)).adapters
    model = AutoModelForCausalLM.from_pretrained(base)
    for layer in figures.layers:
        weight: Any = model.get_submodule(layer.path).weight
        size = float(weight.detach().double().norm())
        assert layer.relative == pytest.approx(layer.norm / size, rel=1e-6)


def test_similarities_are_those_of_the_library(two: list[Path]):
    found = collect([str(two[0]), str(two[1])]).similarities
    expected = hf_lora.similarity(two[0], two[1]).total
    assert found == ((1.0, expected), (expected, 1.0))


def test_the_page_is_whole_and_fetches_nothing(run: Run, two: list[Path], tmp_path: Path):
    output = tmp_path / "page.html"
    found = json.loads(run("report", *two, "-o", output, "--json").stdout)
    text = output.read_text()
    assert found["bytes"] == len(text.encode())
    seen = read(text)
    assert all(each.startswith("#") for each in seen.fetched)
    assert "url(" not in text
    assert "@import" not in text
    words = " ".join(" ".join(seen.seen).split())
    for told in (
        "2 adapters",
        "Where it changes the model",
        "Spectra and effective rank",
        "training, 0.375 at last",
        "held out, 0.5 at last",
        "Similarity",
        "every layer changes something",
        "Size by cause",
        "vllm",
    ):
        assert told in words, told
    # without scripts each number is in the text
    for layer in found["adapters"][0]["layers"]:
        assert f"{layer['norm']:.4g}" in text


def test_dead_layers_and_one_adapter_alone(run: Run, base: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(base)
    hf_lora.wrap(model, r=2)
    hf_lora.save(model, tmp_path / "fresh")
    output = tmp_path / "page.html"
    found = json.loads(run("report", tmp_path / "fresh", "-o", output, "--json").stdout)
    assert len(found["adapters"][0]["dead"]) == 14
    words = " ".join(" ".join(read(output.read_text()).seen).split())
    assert "14 of 14 layers change nothing" in words
    assert "Similarity" not in words
    assert "Training" not in words


def test_a_layer_without_a_number_and_rows(tmp_path: Path, base: Path):
    model = tiny_model()
    hf_lora.wrap(model, targets=["lm_head"], r=2)
    scramble(model)
    hf_lora.save(model, tmp_path / "head")
    figures = collect([str(tmp_path / "head")])
    assert [layer.number for layer in figures.adapters[0].layers] == [None]
    assert "lm_head" in " ".join(read(page(figures)).seen)


def test_a_strangers_words_are_not_obeyed(two: list[Path], tmp_path: Path):
    """Names, bases and histories come from files that anybody may have written."""
    folder = tmp_path / "a & b"
    shutil.copytree(two[0], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"x/{NASTY}"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    history = [{"step": NASTY, "loss": NASTY}, {"step": 1, "loss": 1e999}, 7, {"loss": 1}]
    (folder / "history.json").write_text(json.dumps({"history": history}))
    (folder / "training.json").write_text("{")
    text = page(collect([str(folder)]))
    assert read(text).tags.count("script") == 1
    assert NASTY not in text
    assert "a &amp; b" in text


@pytest.mark.parametrize("content", ["[]", "{}", "7", '{"history": 7}', "no JSON"])
def test_a_history_that_is_none(two: list[Path], tmp_path: Path, content: str):
    folder = tmp_path / "adapter"
    shutil.copytree(two[0], folder)
    (folder / "history.json").write_text(content)
    assert "held out" not in page(collect([str(folder)]))


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1.0, 2.0)],
        [(1.0, 0.0), (2.0, 0.0)],
        [(0.0, float("nan"))],
        [(float(n), 1e-9 * n) for n in range(5000)],
    ],
)
def test_curves_of_any_kind(points: list[tuple[float, float]]):
    text = curves([("a", "line", points)], x="step", y="loss", title="t")
    assert "nan" not in text
    assert text == "" or len(read(text).tags) < 60


def test_what_cannot_be_written_or_read(run: Run, two: list[Path], tmp_path: Path):
    (tmp_path / "file").write_text("")
    told = run("report", two[0], "-o", tmp_path / "file" / "page.html", code=1).stderr
    assert "cannot be written" in told
    (tmp_path / "empty").mkdir()
    told = run("report", tmp_path / "empty", "-o", tmp_path / "page.html", code=1).stderr
    assert "holds no adapter" in told
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_is_wider_than_the_window(two: list[Path], tmp_path: Path, width: int):
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth <= innerWidth,"
        "document.querySelectorAll('td[style]').length].join()</script>"
    )
    text = page(collect([str(each) for each in two]))
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{probe}</body>"))
    done = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"),
            *(f"--window-size={width},900", "--dump-dom", f"file://{tmp_path / 'page.html'}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)[:1]
    assert title.startswith("true,")
    assert int(title.split(",")[1]) >= 14
