"""What a remote store's failure means: worth another try, or what a person must change.

The server's own words are left out: with some servers they quote what was sent, signatures too.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Any

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
"""Everything that s3fs, and what it stands on, raises when an operation fails."""

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
)
_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION to it"
_REMEDIES = {
    "NoSuchBucket": "there is no such bucket; create it, or mend the URL",
    "InvalidBucketName": "that is no bucket name; mend the URL",
    "InvalidAccessKeyId": f"the access key is unknown; {_CREDENTIALS}",
    "InvalidClientTokenId": f"the access key is unknown; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key does not belong to the access key; {_CREDENTIALS}",
    "InvalidToken": f"the session token is not valid; {_CREDENTIALS}",
    "ExpiredToken": "the credentials have expired; renew them and start again",
    "RequestTimeTooSkewed": "this machine's clock is more than 15 minutes off; set it",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "NotImplemented": "the server lacks an operation; If-None-Match on PUT is the likely one",
    "EntityTooLarge": "the object is too large for this server",
    "QuotaExceeded": "the quota is used up; free some space and start again",
    "XMinioStorageFull": "the store is full; free some space and start again",
}
_BY_STATUS = {
    301: _REGION,
    401: f"the credentials are refused; {_CREDENTIALS}",
    403: "access is refused; allow s3:GetObject, s3:PutObject, s3:DeleteObject on the objects and "
    "s3:ListBucket on the bucket, and check that the credentials are the intended ones",
    501: _REMEDIES["NotImplemented"],
    507: "the store is full; free some space and start again",
}
# Sent with a status that speaks of our mistake, but caused by the way there.
_MENDING_CODES = {
    "RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "SlowDown",
    "Throttling", "ThrottlingException", "RequestLimitExceeded", "OperationAborted",
    "ConditionalRequestConflict",
}  # fmt: skip
_MENDING_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
_MENDING_TYPES = (
    ConnectionError,
    TimeoutError,
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.ReadTimeoutError,
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
class Verdict:
    """What a failure means.

    Attributes:
        is_missing: nothing is under this key.
        is_conflict: something is, and it was to be created.
        is_past_end: the object ends before the range that was asked for begins.
        may_mend: the same operation may succeed later.
        text: for the person who must act.
    """

    text: str
    is_missing: bool = False
    is_conflict: bool = False
    is_past_end: bool = False
    may_mend: bool = False


def judge(error: BaseException) -> Verdict:
    """Tell what one of FAILURES means."""
    status, code = _answer(error)
    seen = code or (f"HTTP {status}" if status else type(error).__name__)
    if code in _REMEDIES:
        return Verdict(f"{_REMEDIES[code]} ({code})")
    if status == 412 or isinstance(error, FileExistsError):
        return Verdict("it exists already", is_conflict=True)
    if isinstance(error, FileNotFoundError):
        return Verdict("it does not exist", is_missing=True)
    if status == 416:
        return Verdict("it ends before this range", is_past_end=True)
    if isinstance(error, _NO_CREDENTIALS):
        return Verdict(f"there are no usable credentials; {_CREDENTIALS} ({seen})")
    if isinstance(error, boto.SSLError):
        return Verdict(f"no trusted TLS connection; check AWS_CA_BUNDLE and the endpoint ({seen})")
    if code in _MENDING_CODES or status in _MENDING_STATUSES:
        return Verdict(f"the server answers {seen}", may_mend=True)
    if status in _BY_STATUS:
        return Verdict(f"{_BY_STATUS[status]} ({seen})")
    if isinstance(error, PermissionError):
        return Verdict(f"{_BY_STATUS[403]} ({seen})")
    if status == 0 and isinstance(error, _MENDING_TYPES):
        return Verdict(f"the server cannot be reached or does not answer ({seen})", may_mend=True)
    if isinstance(error, ValueError | boto.ParamValidationError):
        return Verdict(f"the URL or the endpoint is malformed; check AWS_ENDPOINT_URL ({seen})")
    if isinstance(error, OSError) and error.errno and not status:
        seen = f"{seen} {errno.errorcode.get(error.errno, error.errno)}"
    return Verdict(f"the operation failed ({seen})")


def _answer(error: BaseException) -> tuple[int, str]:
    """The HTTP status and the error code of the server's answer; 0 and "" without them.

    s3fs translates the client's errors to Python's, and keeps the original as their cause.
    """
    current: BaseException | None = error
    while current is not None:
        response: Any = getattr(current, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = str(response.get("Error", {}).get("Code", ""))
            # After a HEAD, which has no body, the code is the status.
            return int(status), code if re.fullmatch(r"[A-Za-z][A-Za-z0-9.]{0,63}", code) else ""
        current = current.__cause__
    return 0, ""
