"""``hf-lora skill``: a file that tells an agent how to use the command."""

from pathlib import Path

from hf_lora.cli.output import Result

FILE = Path(__file__).with_name("skill.md")


def skill() -> Result:
    """Return the file."""
    text = FILE.read_text(encoding="utf-8")
    return Result(data={"skill": text}, text=text.rstrip("\n"), as_it_is=True)
