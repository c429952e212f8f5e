"""The lock names every package with its hashes, no place to get it from, and no TensorFlow."""

import re
from pathlib import Path

LOCK = (Path(__file__).parent.parent / "requirements.lock").read_text(encoding="utf-8")
REQUIREMENTS = re.findall(r"^(\S+?)==(\S+)(?: ;[^\\]*)? \\\n((?:    --hash=.+\n)+)", LOCK, re.M)


def test_every_line_is_a_hashed_requirement_or_a_comment() -> None:
    packages = [line for line in LOCK.splitlines() if not line.startswith((" ", "#"))]
    assert len(packages) == len(REQUIREMENTS) > 40
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for _, version, _ in REQUIREMENTS)


def test_no_host_and_no_path_is_written() -> None:
    assert not re.search(r"://|file:|index-url|find-links|(?:^|\s)/", LOCK)


def test_dead_weight_stays_out() -> None:
    names = {name for name, _, _ in REQUIREMENTS}
    assert {"keras", "keras-hub", "jax", "hatchling"} <= names
    assert not {name for name in names if name.startswith(("tensorflow", "torch", "nvidia-"))}
