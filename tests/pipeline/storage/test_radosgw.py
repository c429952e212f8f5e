"""The same contract, kept by a real S3 server that checks signatures and survives its own death."""

from __future__ import annotations

import pytest

from pipeline.errors import StorageError
from pipeline.storage.object_store import open_store
from tests.pipeline.storage.test_object_store import TestS3Store as _S3Contract
from tests.pipeline.storage.test_object_store import bucket as bucket
from tests.s3 import S3Server

pytestmark = pytest.mark.radosgw


@pytest.fixture(scope="module")
def server(radosgw: S3Server) -> S3Server:
    return radosgw


class TestRadosgwStore(_S3Contract):
    """Every test of S3's contract."""


@pytest.mark.parametrize(
    ("variable", "remedy"),
    [
        ("AWS_SECRET_ACCESS_KEY", "does not belong to the access key"),
        ("AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_wrong_keys_end_at_once_with_the_remedy(
    variable: str, remedy: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "wrong-canary")
    for use in (
        lambda store: store.get("key"),
        lambda store: store.put("key", b""),
        lambda store: store.list(),
    ):
        with pytest.raises(StorageError, match=remedy) as caught:
            use(open_store(f"s3://{bucket}/root"))
        assert "wrong-canary" not in str(caught.value)
