"""The fleet of one machine, by the scripts that people run: up, two nightly passes, down."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.infra.validators import INFRA, ROOT
from tests.pipeline.tiny_runs import source

# A Ray head of its own, and a driver for each run.
pytestmark = [pytest.mark.ray, pytest.mark.infra, pytest.mark.exhaustive]

_PORTS = ("S3", "RAY", "DASHBOARD", "METRICS", "AGENT")


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which the scripts keep to a folder and to ports of this test alone."""
    environment = {
        # As cron's, with nothing of the caller's: no token, no credentials.
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "LANG": "C.UTF-8",
        "QUANTFLEET_BIN": str(Path(sys.executable).parent),
        "QUANTFLEET_LAPTOP": str(tmp_path / "state"),
        "QUANTFLEET_NO_MODEL": "1",
        # Short: sockets lie there.
        "QUANTFLEET_RAY_TEMP": f"/tmp/ray-{os.getpid()}",
    }
    environment |= dict(
        zip((f"QUANTFLEET_{name}_PORT" for name in _PORTS), _free_ports(), strict=True)
    )
    try:
        yield environment
    finally:
        run("down.sh", environment)
        shutil.rmtree(environment["QUANTFLEET_RAY_TEMP"], ignore_errors=True)


def _free_ports() -> list[str]:
    # Ray gives its workers the ports from 10002 to 19999.
    probes = []
    for port in range(21000, 30000):
        probe = socket.socket()
        try:
            probe.bind(("127.0.0.1", port))
            probes.append(probe)
        except OSError:
            probe.close()
        if len(probes) == len(_PORTS):
            break
    found = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return found


def run(
    script: str, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [str(INFRA / "laptop" / script), *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def catalog_of_a_tiny_model(folder: Path) -> Path:
    path = folder / "catalog.yaml"
    model = {"name": "tiny", "preset": str(source()), "recipes": ["int8"]}
    path.write_text(yaml.safe_dump({"root": "s3://quantfleet/tiny", "models": [model]}))
    return path


def test_up_two_nights_and_down(fleet: dict[str, str], tmp_path: Path) -> None:
    up = run("up.sh", fleet)
    assert up.returncode == 0, up.stderr
    state = Path(fleet["QUANTFLEET_LAPTOP"])
    assert (state / "fleet.env").stat().st_mode & 0o077 == 0
    pids = [int(pid) for pid in (state / "pids").read_text().split()]
    again = run("up.sh", fleet)
    assert again.returncode == 2
    assert "down.sh first" in again.stderr

    catalog = str(catalog_of_a_tiny_model(tmp_path))
    results = []
    for _ in range(2):
        night = run("nightly.sh", fleet, catalog, "--json")
        assert night.returncode == 0, night.stderr
        results.append([outcome["result"] for outcome in json.loads(night.stdout)])
    assert results == [["published"], ["up to date"]]

    settings = (state / "fleet.env").read_text().splitlines()
    token = dict(line.split("=", 1) for line in settings)["RAY_AUTH_TOKEN"]
    logs = [path for path in Path(fleet["QUANTFLEET_RAY_TEMP"]).rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if token in path.read_text(errors="replace")]

    down = run("down.sh", fleet)
    assert down.returncode == 0, down.stderr
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not (state / "fleet.env").exists()


def test_a_night_without_a_fleet_says_what_to_do(fleet: dict[str, str]) -> None:
    night = run("nightly.sh", fleet)
    assert night.returncode == 2
    assert "up.sh first" in night.stderr
