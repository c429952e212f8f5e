"""What the runs of a catalog are fingerprinted by."""

from __future__ import annotations

from pathlib import Path

from jobs.catalog.catalog_runs import PACKAGES, package_versions, texts_fingerprint


def test_texts_are_fingerprinted_file_by_file(tmp_path: Path) -> None:
    for name in ("a b.txt", "c.txt"):
        (tmp_path / name).write_text("text")
    state = texts_fingerprint([f"{tmp_path}/*.txt", "hf:owner/name"])
    assert list(state) == [
        f"file://{tmp_path}/a b.txt",
        f"file://{tmp_path}/c.txt",
        "hf:owner/name",
    ]
    (tmp_path / "c.txt").write_text("tent")
    again = texts_fingerprint([f"{tmp_path}/*.txt", "hf:owner/name"])
    assert [n for n in state if state[n] != again[n]] == [f"file://{tmp_path}/c.txt"]


def test_package_versions_match_those_of_a_plan() -> None:
    from pipeline.machine import versions

    assert package_versions() == versions()
    assert set(PACKAGES) == set(versions())
