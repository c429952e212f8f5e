"""A server's answer decides whether to retry, or what the user must change."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError

from pipeline.storage.remote_errors import classify


def answer(status: int, code: str) -> ClientError:
    error = {"Code": code, "Message": "AKIAEXAMPLECANARY000 was sent"}
    return ClientError(
        {"Error": error, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "RequestTimeTooSkewed", "clock is more than 15 minutes off; set it"),
        (403, "SignatureDoesNotMatch", "the secret key does not belong to the access key"),
        (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        (400, "ExpiredToken", "renew them"),
        (403, "AccessDenied", "s3:PutObject"),
        (404, "NoSuchBucket", "create it, or correct the URL"),
        (301, "PermanentRedirect", "AWS_DEFAULT_REGION"),
        (501, "NotImplemented", "If-None-Match"),
        (507, "XMinioStorageFull", "free some space"),
    ],
)
def test_what_the_user_must_change_is_said_and_not_retried(
    status: int, code: str, remedy: str
) -> None:
    failure = classify(answer(status, code))
    assert remedy in failure.text
    assert failure.meaning == "permanent"
    assert "CANARY" not in failure.text


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "SlowDown"),
        (500, "InternalError"),
        (502, ""),
        (504, ""),
        (429, "TooManyRequests"),
        (400, "RequestTimeout"),
        (400, "BadDigest"),
        (409, "ConditionalRequestConflict"),
        (200, "SlowDown"),
    ],
)
def test_transient_failures_are_retried(status: int, code: str) -> None:
    assert classify(answer(status, code)).meaning == "transient"


def test_a_failed_condition_is_a_conflict_and_no_key_is_missing() -> None:
    assert classify(answer(412, "PreconditionFailed")).meaning == "conflict"
    assert classify(FileNotFoundError("key")).meaning == "missing"
