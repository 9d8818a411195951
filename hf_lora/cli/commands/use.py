"""``hf-lora generate``, ``eval`` and ``chat``: an adapter at work, beside the base without it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from transformers import set_seed

import hf_lora
from hf_lora.cli.output import Result, plain, tell
from hf_lora.errors import ConfigError
from hf_lora.hub.download import locate
from hf_lora.layers.names import DEFAULT
from hf_lora.recipes.evaluation import Score, rows_of, score
from hf_lora.recipes.opened import Opened, open_adapter
from hf_lora.recipes.progress import bars

HELP = """\
/base     answer without adapters, or with them again
/use NAME answer with another of the adapters
/reset    forget what was said
/quit     end (so does Ctrl-D)"""


def generate(
    adapter: str,
    prompts: list[str],
    *,
    chat: bool,
    compare: bool,
    most: int,
    temperature: float,
    seed: int,
    **where: Any,
) -> Result:
    """Continue prompts, read from standard input, a line each, if there are none.

    Raises:
        HfLoRAError: The adapter or its base cannot be loaded, or a prompt cannot be used.
    """
    given = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not given:
        raise ConfigError("there is no prompt: --prompt TEXT, or a line each on standard input")
    opened = open_adapter(adapter, **where)
    rows = []
    for prompt in given:
        said: Any = [{"role": "user", "content": prompt}] if chat else prompt

        def answer(said: Any = said) -> str:
            set_seed(seed)
            return opened.answer(said, most=most, temperature=temperature)

        row = {"prompt": prompt, "text": answer()}
        if compare:
            with hf_lora.no_adapter(opened.model):
                row["base"] = answer()
        rows.append(row)
    return Result(
        data={"adapter": adapter, "base": opened.base, "answers": rows},
        text=_text(rows),
        as_it_is=True,
    )


def _text(rows: list[dict[str, str]]) -> str:
    if len(rows) == 1 and "base" not in rows[0]:
        return rows[0]["text"]
    lines = []
    for row in rows:
        lines += [f"> {row['prompt']}", row["text"]]
        lines += [f"without the adapter: {row['base']}"] if "base" in row else []
        lines.append("")
    return "\n".join(lines[:-1])


def evaluate(
    adapter: str,
    data: str,
    *,
    form: str | None,
    split: str,
    batch_size: int,
    max_length: int | None,
    **where: Any,
) -> Result:
    """Measure loss and accuracy on rows, with the adapter and without.

    Raises:
        HfLoRAError: The adapter, its base or the data cannot be used.
    """
    opened = open_adapter(adapter, **where)
    model = opened.model
    with bars() as progress:
        task = progress.add_task("reading the data", total=None)
        rows = rows_of(
            data,
            opened.tokenizer,
            model.config,
            form=form,
            split=split,
            max_length=max_length,
            progress=lambda done: progress.update(task, completed=done),
        )
        progress.remove_task(task)

        def measure(words: str) -> Score:
            task = progress.add_task(words, total=len(rows))
            return score(
                model,
                rows,
                batch_size=batch_size,
                progress=lambda done: progress.update(task, completed=done),
            )

        with hf_lora.no_adapter(model):
            before = measure("without the adapter")
        after = measure("with the adapter")
    scores = {"base": before, "adapter": after}
    lines = [f"{'':8}  {'loss':>8}  {'perplexity':>10}  {'accuracy':>8}"]
    lines += [
        f"{name:8}  {found.loss:8.4f}  {found.perplexity:10.3f}  {found.accuracy:8.1%}"
        for name, found in scores.items()
    ]
    lines.append(f"{len(rows)} rows of {data}")
    counted = {
        name: {**plain(found), "perplexity": found.perplexity} for name, found in scores.items()
    }
    return Result(data={"rows": len(rows), "data": data, **counted}, text="\n".join(lines))


def chat(
    adapters: list[str], *, system: str | None, most: int, temperature: float, **where: Any
) -> Result:
    """Answer line by line until the input ends; several adapters answer side by side.

    Raises:
        HfLoRAError: An adapter or the base cannot be loaded, or there is no chat template.
    """
    opened = open_adapter(adapters[0], **where)
    names = [DEFAULT, *(f"adapter{n}" for n in range(2, len(adapters) + 1))]
    for name, source in zip(names[1:], adapters[1:], strict=True):
        hf_lora.load(opened.model, locate(source), adapter=name)
    opened.encode([{"role": "user", "content": "?"}])  # refused before anything is asked
    talk = Talk(opened, dict(zip(names, adapters, strict=True)), system, most, temperature)
    if sys.stdin.isatty():
        tell(f"{opened.base} with {', '.join(adapters)}. /help shows what else there is.")
    with contextlib.suppress(KeyboardInterrupt):
        for line in _lines():
            if not talk.hear(line.strip()):
                break
    return Result(data={"base": opened.base, "turns": talk.turns}, text="")


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    console = Console(stderr=True)
    while True:
        try:
            yield console.input("[bold]> [/bold]")
        except EOFError:
            return


class Talk:
    """A conversation, or several side by side: one for each adapter, on the same questions."""

    def __init__(
        self,
        opened: Opened,
        adapters: dict[str, str],
        system: str | None,
        most: int,
        temperature: float,
    ):
        self._opened, self._adapters = opened, adapters
        self._most, self._temperature = most, temperature
        self._begin = [{"role": "system", "content": system}] if system else []
        self._using = list(adapters)
        self._base = False
        self.turns: list[dict[str, str]] = []
        self._forget()

    def hear(self, line: str) -> bool:
        """Obey or answer a line; returns whether to go on."""
        word, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/base": self._switch,
            "/use": self._use,
            "/reset": lambda _: self._forget(),
            "/help": lambda _: tell(HELP),
        }
        if word in ("/quit", "/exit"):
            return False
        if word in commands:
            commands[word](rest.strip())
        elif word.startswith("/"):
            tell(f"there is no {word}\n{HELP}")
        elif line:
            self._ask(line)
        return True

    def _ask(self, line: str) -> None:
        using = ["base"] if self._base else self._using
        for name in using:
            history = self._histories[name]
            history.append({"role": "user", "content": line})
            if len(using) > 1:
                tell(f"{self._adapters[name]}:", style="bold")
            with self._with(name):
                text = self._opened.answer(
                    history, most=self._most, temperature=self._temperature, stream=True
                )
            history.append({"role": "assistant", "content": text})
            self.turns.append({"by": name, "prompt": line, "text": text})

    def _with(self, name: str) -> contextlib.AbstractContextManager[Any]:
        model = self._opened.model
        return hf_lora.no_adapter(model) if name == "base" else hf_lora.use_adapter(model, name)

    def _switch(self, _: str) -> None:
        self._base = not self._base
        tell("answers come from the base alone" if self._base else "the adapter is on again")

    def _use(self, wanted: str) -> None:
        found = [n for n, source in self._adapters.items() if wanted in (n, source)]
        if not found:
            tell(f"there is no {wanted!r}; there are {', '.join(self._adapters.values())}")
            return
        self._using, self._base = found, False

    def _forget(self) -> None:
        self._histories = {name: list(self._begin) for name in [*self._adapters, "base"]}
