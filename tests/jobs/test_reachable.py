"""A store that a user names answers at once, or is named in a line."""

from __future__ import annotations

import time

import pytest

from jobs.reachable import reachable
from pipeline.errors import StorageError
from pipeline.storage.backend import PATIENCE_VARIABLE
from tests.s3 import S3Server


def test_a_store_that_answers_is_opened_with_all_patience(tmp_path) -> None:
    store = reachable(str(tmp_path), "plan.json")
    assert store.root_url == f"file://{tmp_path}"
    assert store.list() == ()


def test_a_store_that_does_not_answer_is_named_in_seconds(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("jobs.reachable._DEADLINE_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://bucket/x/plan.json.*cannot be reached"):
        reachable("s3://bucket/x", "plan.json")
    assert time.monotonic() - start < 10
    # Whoever asked for less patience gets less.
    monkeypatch.setattr("jobs.reachable._DEADLINE_SECONDS", 600.0)
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")
    with pytest.raises(StorageError, match=r"1 times in \d seconds"):
        reachable("s3://bucket/x", "plan.json")
