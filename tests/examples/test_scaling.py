"""The page about many processes: its tables are what the library says today."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_tables_are_made_anew():
    command = [sys.executable, str(EXAMPLES / "scaling.py")]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=480)
    page = (EXAMPLES / "scaling.md").read_text(encoding="utf-8")
    assert made.stdout.rstrip("\n") == page.rstrip("\n")
    assert page.count("| FSDP2 |") == 3
