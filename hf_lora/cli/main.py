"""The commands of ``hf-lora``: their words, arguments and options; what they do is in ``commands``.

Those modules are imported when a command is called, so that ``--help`` needs neither torch nor
transformers.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lora.cli import computing, looking, making
from hf_lora.cli.options import Json, OtherBase, Patterns, Revision, Subfolder
from hf_lora.cli.options import command as _command
from hf_lora.cli.output import execute
from hf_lora.version import __version__

app = typer.Typer(
    help="LoRA for Hugging Face models: init, plan, train, try, show, merge, push and pull.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"hf-lora {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show it and stop."),
    ] = False,
) -> None:
    """Take no options of its own but these."""


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder of a model, or its id on the Hub.")],
    targets: Annotated[
        Patterns,
        typer.Option("--targets", "-t", help="Layers to adapt: a pattern or a word; repeatable."),
    ] = None,
    exclude: Annotated[Patterns, typer.Option(help="Layers to leave alone.")] = None,
    train: Annotated[Patterns, typer.Option(help="Modules to train in full.")] = None,
    r: Annotated[int | None, typer.Option("--rank", "--r", "-r", help="Rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Strength.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout before A, in training.")] = None,
    rslora: Annotated[
        bool | None, typer.Option("--rslora/--no-rslora", help="Scale by alpha / sqrt(r).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the adapter's tensors.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="LoRAConfig in YAML or JSON; options go before it.")
    ] = None,
    world: Annotated[
        int, typer.Option(help="Processes to share a training: what each keeps and sends.")
    ] = 1,
    revision: Revision = None,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the folder or repo.")] = None,
    as_json: Json = False,
) -> None:
    """Show what wrapping a model would do, without its weights. Exit code 1: it would not work."""
    said: dict[str, Any] = {
        "targets": targets or None,
        "exclude": exclude or None,
        "train": train or None,
        "r": r,
        "alpha": alpha,
        "dropout": dropout,
        "rslora": rslora,
        "dtype": dtype,
    }
    fields = {name: value for name, value in said.items() if value is not None}
    execute(
        lambda: _command("hf_lora.cli.commands.plan").run(
            model,
            fields,
            config=config,
            revision=revision,
            gguf_file=gguf_file,
            world=world,
        ),
        as_json=as_json,
    )


app.command()(making.init)
app.command()(making.train)
app.command()(looking.report)
app.command()(looking.schema)
app.command()(looking.skill)


@app.command()
def show(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, or its id on the Hub.")],
    revision: Revision = None,
    subfolder: Subfolder = None,
    heatmap: Annotated[
        Path | None, typer.Option(help="Picture of update / weight by block and module.")
    ] = None,
    base: OtherBase = None,
    as_json: Json = False,
) -> None:
    """Show what an adapter holds and how much each layer changes. Needs no base model."""
    execute(
        lambda: _command("hf_lora.cli.commands.show").run(
            adapter, revision, subfolder, heatmap=heatmap, base=base
        ),
        as_json=as_json,
    )


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, or its id on the Hub.")],
    client: Annotated[
        str | None,
        typer.Option(
            "--client",
            "-c",
            help="peft, vllm, llama.cpp, mlx, diffusers or kohya; without it, who can use it.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder that is not there yet.")
    ] = None,
    base: OtherBase = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; else the adapter's own.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="llama.cpp: one GGUF of base and adapter together.")
    ] = False,
    converter: Annotated[
        Path | None, typer.Option(help="llama.cpp's folder, whose convert_hf_to_gguf.py is run.")
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    as_json: Json = False,
) -> None:
    """Write an adapter as other software reads it. Exit code 1: that software cannot use it."""
    if (client is None) != (output is None):
        raise typer.BadParameter("--client and --output go together; without both it only tells")
    execute(
        lambda: _command("hf_lora.cli.commands.export").run(
            adapter,
            client,
            output,
            base=base,
            dtype=dtype,
            merged=merged,
            converter=converter,
            revision=revision,
            subfolder=subfolder,
        ),
        as_json=as_json,
    )


@app.command()
def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter folders, or ids on the Hub; NAME=0.5 weighs.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder that is not there yet.")],
    base: OtherBase = None,
    revision: Annotated[str | None, typer.Option(help="Of the base on the Hub.")] = None,
    keep_downloads: Annotated[
        bool, typer.Option(help="Whether files of a base on the Hub stay in the cache.")
    ] = True,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32 for all; else as they are.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a sample again and compare with float64.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted merge has stopped.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure what would be lost; write nothing.")
    ] = False,
    check_base: Annotated[
        bool, typer.Option("--check-base/--any-base", help="Whether it must be the right base.")
    ] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that came with the base.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture of what was rounded away.")] = None,
    as_json: Json = False,
) -> None:
    """Merge adapters into their base, file to file: no model in memory, untouched bytes copied."""
    execute(
        lambda: _command("hf_lora.cli.commands.merge").run(
            adapters,
            output,
            plot=plot,
            base=base,
            revision=revision,
            keep_downloads=keep_downloads,
            dtype=dtype,
            verify=verify,
            resume=resume,
            dry_run=dry_run,
            check_base=check_base,
            trust_remote_code=trust_remote_code,
        ),
        as_json=as_json,
    )


app.command()(computing.combine)
app.command()(computing.resize)
app.command()(computing.similarity)
app.command()(computing.extract)
app.command()(computing.diff)


Dtype = Annotated[str, typer.Option(help="Type to load the base in; auto: as it is stored.")]
Most = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="0: always the likeliest token. Above: sampled.")
]


@app.command()
def generate(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, or its id on the Hub.")],
    prompt: Annotated[
        Patterns,
        typer.Option("--prompt", "-p", help="Repeatable; else a line each on standard input."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the tokenizer's chat template.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the base's answer without the adapter, too.")
    ] = False,
    max_new_tokens: Most = 128,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    base: OtherBase = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Let a model with an adapter continue prompts."""
    execute(
        lambda: _command("hf_lora.cli.commands.use").generate(
            adapter,
            prompt or [],
            chat=chat,
            compare=compare,
            most=max_new_tokens,
            temperature=temperature,
            seed=seed,
            base=base,
            revision=revision,
            subfolder=subfolder,
            dtype=dtype,
        ),
        as_json=as_json,
    )


@app.command("eval")
def evaluate(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, or its id on the Hub.")],
    data: Annotated[
        str, typer.Argument(help="A .jsonl, .json, .csv, .parquet or .txt file, or a data set.")
    ],
    form: Annotated[
        str | None, typer.Option(help="text, completion or chat; else told from the columns.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 8,
    max_length: Annotated[int | None, typer.Option(min=2, help="Cut rows to so many tokens.")] = (
        None
    ),
    base: OtherBase = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure loss and accuracy on data, with an adapter and without it."""
    execute(
        lambda: _command("hf_lora.cli.commands.use").evaluate(
            adapter,
            data,
            form=form,
            split=split,
            batch_size=batch_size,
            max_length=max_length,
            base=base,
            revision=revision,
            subfolder=subfolder,
            dtype=dtype,
        ),
        as_json=as_json,
    )


@app.command()
def chat(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter folders or ids: several answer side by side.")
    ],
    system: Annotated[str | None, typer.Option(help="What the system says first.")] = None,
    max_new_tokens: Most = 512,
    temperature: Temperature = 0.0,
    base: OtherBase = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Talk with a model and its adapter; /base switches the adapter off, /help shows the rest."""
    execute(
        lambda: _command("hf_lora.cli.commands.use").chat(
            adapters,
            system=system,
            most=max_new_tokens,
            temperature=temperature,
            base=base,
            dtype=dtype,
        ),
        as_json=as_json,
    )


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Adapter folder.")],
    repo_id: Annotated[str, typer.Argument(help="user/name; made if there is none.")],
    base: Annotated[
        str | None, typer.Option(help="Hub id of the base model to name in what is pushed.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="What a new repo is.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none.")] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    as_json: Json = False,
) -> None:
    """Push an adapter folder and a model card to the Hub, in one commit."""
    execute(
        lambda: _command("hf_lora.cli.commands.hub").push(
            folder,
            repo_id,
            base=base,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=message,
        ),
        as_json=as_json,
    )


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(help="user/name.")],
    folder: Annotated[Path, typer.Argument(help="Where the adapter goes.")],
    revision: Revision = None,
    subfolder: Subfolder = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter there.")] = False,
    as_json: Json = False,
) -> None:
    """Copy an adapter from the Hub into a folder, checked."""
    execute(
        lambda: _command("hf_lora.cli.commands.hub").pull(
            repo_id, folder, revision=revision, subfolder=subfolder, force=force
        ),
        as_json=as_json,
    )
