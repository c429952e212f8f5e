"""Classify a remote store's failures: retry, or tell the user what to change.

The server's own message is never shown: some servers quote the request, signature included.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import urllib3.exceptions
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

FAILURES = (
    OSError,
    ValueError,  # a malformed endpoint
    boto.BotoCoreError,
    boto.ClientError,
    ResponseParserError,
    aiohttp.ClientError,
    urllib3.exceptions.HTTPError,
)
"""Everything that s3fs and the libraries below it raise when an operation fails."""

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
)
_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION to it"
_REMEDIES = {
    "NoSuchBucket": "there is no such bucket; create it, or correct the URL",
    "InvalidBucketName": "the bucket name is not valid; correct the URL",
    "InvalidAccessKeyId": f"the access key is unknown; {_CREDENTIALS}",
    "InvalidClientTokenId": f"the access key is unknown; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not belong to the access key; {_CREDENTIALS}",
    "InvalidToken": f"the session token is not valid; {_CREDENTIALS}",
    "ExpiredToken": "the credentials have expired; renew them and start again",
    "RequestTimeTooSkewed": "this machine's clock is more than 15 minutes off; set it",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "NotImplemented": "the server lacks an operation, probably If-None-Match on PUT",
    "EntityTooLarge": "the object is too large for this server",
    "QuotaExceeded": "the quota is used up; free some space and start again",
    "XMinioStorageFull": "the store is full; free some space and start again",
}
_BY_STATUS = {
    301: _REGION,
    401: f"the credentials were rejected; {_CREDENTIALS}",
    403: "access denied; allow s3:GetObject, s3:PutObject, s3:DeleteObject on the objects and "
    "s3:ListBucket on the bucket, and check that the credentials are the intended ones",
    501: _REMEDIES["NotImplemented"],
    507: "the store is full; free some space and start again",
}
# Sent with a 4xx status, but transient all the same.
_TRANSIENT_CODES = {
    "RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "SlowDown",
    "Throttling", "ThrottlingException", "RequestLimitExceeded", "OperationAborted",
    "ConditionalRequestConflict",
}  # fmt: skip
_TRANSIENT_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
_TRANSIENT_TYPES = (
    ConnectionError,
    TimeoutError,
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ChecksumError,
    boto.FlexibleChecksumError,
    ResponseParserError,
    aiohttp.ClientError,
    urllib3.exceptions.HTTPError,
)
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.NoAuthTokenError,
    boto.TokenRetrievalError,
    boto.SSOError,
    boto.ProfileNotFound,
)


@dataclass(frozen=True)
class Failure:
    """What a failure means, with words for the user."""

    text: str
    meaning: Literal["missing", "conflict", "past end", "transient", "permanent"] = "permanent"
    """A conflict: the object exists already, or was changed. Transient: try again."""


def classify(error: BaseException) -> Failure:
    """What one of FAILURES means."""
    status, code = _answer(error)
    seen = code or (f"HTTP {status}" if status else type(error).__name__)
    if code in _REMEDIES:
        return Failure(f"{_REMEDIES[code]} ({code})")
    if status == 412 or isinstance(error, FileExistsError):
        return Failure("it already exists", "conflict")
    if isinstance(error, FileNotFoundError):
        return Failure("it does not exist", "missing")
    if status == 416:
        return Failure("it ends before this range", "past end")
    if isinstance(error, _NO_CREDENTIALS):
        return Failure(f"there are no usable credentials; {_CREDENTIALS} ({seen})")
    if isinstance(error, boto.SSLError):
        return Failure(f"no trusted TLS connection; check AWS_CA_BUNDLE and the endpoint ({seen})")
    if code in _TRANSIENT_CODES or status in _TRANSIENT_STATUSES:
        return Failure(f"the server answers {seen}", "transient")
    if status in _BY_STATUS:
        return Failure(f"{_BY_STATUS[status]} ({seen})")
    if isinstance(error, PermissionError):
        return Failure(f"{_BY_STATUS[403]} ({seen})")
    if status == 0 and isinstance(error, _TRANSIENT_TYPES):
        return Failure(f"the server cannot be reached or does not answer ({seen})", "transient")
    if isinstance(error, ValueError | boto.ParamValidationError):
        return Failure(f"the URL or the endpoint is malformed; check AWS_ENDPOINT_URL ({seen})")
    if isinstance(error, OSError) and error.errno and not status:
        seen = f"{seen} {errno.errorcode.get(error.errno, error.errno)}"
    return Failure(f"the operation failed ({seen})")


def _answer(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of the server's answer; 0 and "" if there is none.

    s3fs translates the client's errors into Python's and keeps the original as their cause.
    """
    current: BaseException | None = error
    while current is not None:
        response: Any = getattr(current, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = str(response.get("Error", {}).get("Code", ""))
            # A HEAD response has no body: botocore then puts the status in place of the code.
            return int(status), code if re.fullmatch(r"[A-Za-z][A-Za-z0-9.]{0,63}", code) else ""
        current = current.__cause__
    return 0, ""
