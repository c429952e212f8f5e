"""What a card says is run as it is printed, by stock KerasHub, from a hub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.push import PushJob, push_run
from tests.hub import OWNER, TOKEN, fake_hub
from tests.jobs.release.runs import finished


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_stock_kerashub_loads_a_release_by_the_commands_of_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{OWNER}/tiny"
    with fake_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        job = PushJob(run_url=str(finished()), repository_url=f"hf://{name}")
        push_run(job, dry_run=False, as_json=False)
        card = hub.repos[name].content("README.md").decode()
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(blocks) == 2
        script = "\n".join(f"{block}\nprint(model.dtype_policy.name)" for block in blocks)
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("The capital of France is")
    assert len(lines) >= 3
