"""The environments of the programs that read exported checkpoints; `make test-serve` builds them.

Each has a Python of its own and nothing of this project: their requirements exclude one another.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / ".venv-serve"


def ask(environment: str, jobs: Sequence[dict[str, Any]]) -> Any:
    """Run `<environment>_reader.py` on some jobs, and return what it answers.

    Its standard input is the list of jobs as JSON, the last line of its output the answer.
    """
    python = FOLDER / environment / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{python} is missing: run make test-serve, which builds it")
    reader = Path(__file__).with_name(f"{environment}_reader.py")
    done = subprocess.run(
        [python, "-I", reader], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{reader.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1])
