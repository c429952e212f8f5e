"""How the command begins, whoever starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, subprocess, sys
from jobs.cli.start import open_closed_streams

open_closed_streams()
with open(sys.argv[1], "w") as file:
    os.write(2, b"a library's complaint")
    subprocess.run(["sh", "-c", "echo another process >&2; echo here"], check=True)
    print("text", file=sys.stderr)
    file.write(f"{file.fileno() > 2}")
"""


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_what_closed_standard_streams_are_told(tmp_path: Path, closed: str) -> None:
    given = ["sh", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", PROGRAM]
    file = tmp_path / "file"
    assert subprocess.run([*given, str(file)], check=False).returncode == 0
    assert file.read_text() == "True"
