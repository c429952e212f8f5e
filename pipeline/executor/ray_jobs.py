"""Ray Jobs: submit, list and stop, each answered or refused within a minute."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from pipeline.executor.protocol import ExecutorError

_T = TypeVar("_T")
_ANSWER_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
# The answer of a head whose agents, which start jobs, are not up yet.
_NO_AGENT = "No available agent"
_AGENT_SECONDS = 60.0
_POLL_SECONDS = 1.0
_ALIVE = frozenset({"PENDING", "RUNNING"})
# Both would send the client elsewhere than --address says.
_REDIRECTIONS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """A job as Ray reports it, which may be wrong after the head was lost: storage decides.

    Attributes:
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_code: of its entrypoint; None if it has not ended, or was killed.
    """

    submission_id: str
    status: str
    exit_code: int | None = None

    @property
    def is_alive(self) -> bool:
        return self.status in _ALIVE


class RayJobs:
    """The jobs of one cluster, by its dashboard's address."""

    def __init__(self, address: str, *, working_dir: str | None = None) -> None:
        """Connect to an address such as http://head:8265.

        Args:
            working_dir: a folder, or the URI of a .zip, to ship as the jobs' working folder; None
                if the nodes have the code.

        Raises:
            ExecutorError: no cluster answers there, or it refuses the token.
        """
        self._address = _checked(address)
        self._environment = {} if working_dir is None else {"working_dir": working_dir}
        self._client = self._call(lambda: _Client(self._address, headers=_headers()))

    def list(self) -> Mapping[str, RayJob]:
        """All jobs by submission id."""
        found = self._call(self._client.list_jobs)
        return {
            job.submission_id: RayJob(
                submission_id=job.submission_id,
                status=str(job.status),
                exit_code=job.driver_exit_code,
            )
            for job in found
            if job.submission_id
        }

    def submit(self, submission_id: str, entrypoint: str, metadata: Mapping[str, str]) -> None:
        """Start a job, unless there is one of that id already."""
        submit = partial(
            self._client.submit_job,
            entrypoint=entrypoint,
            submission_id=submission_id,
            # Never a secret: Ray shows and logs it. Nodes have credentials of their own.
            runtime_env=dict(self._environment),
            metadata=dict(metadata),
            # A driver only waits for its workers, which take CPUs of their own.
            entrypoint_num_cpus=0,
        )
        deadline = time.monotonic() + _AGENT_SECONDS
        while True:
            try:
                self._call(submit)
                return
            except ExecutorError as error:
                # A lost answer to this very request looks the same.
                if submission_id in self.list():
                    return
                if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)

    def stop(self, submission_id: str) -> None:
        """Stop a job: SIGTERM, and a few seconds later SIGKILL."""
        self._call(lambda: self._client.stop_job(submission_id))

    def _call(self, request: Callable[[], _T]) -> _T:
        try:
            return request()
        except AuthenticationError:
            # Ray's message is long, and may quote what was sent.
            raise ExecutorError(
                f"the Ray cluster at {self._address} refuses the token; set RAY_AUTH_TOKEN, or "
                "RAY_AUTH_TOKEN_PATH, to the cluster's own"
            ) from None
        except (requests.exceptions.RequestException, ConnectionError) as error:
            cause: BaseException = error
            while cause.__context__ is not None:
                cause = cause.__context__
            reason = " ".join(str(cause).split())[:300] or type(cause).__name__
            raise ExecutorError(
                f"no Ray cluster answers at {self._address} ({reason}); check --address, the "
                "dashboard's port, and that this machine can reach it"
            ) from None
        except (RuntimeError, ValueError) as error:
            raise ExecutorError(
                f"the Ray cluster at {self._address} refuses: {_first_line(error)}"
            ) from None


class _Client(JobSubmissionClient):
    """Ray's client, with timeouts."""

    def _do_request(self, *args: Any, **options: Any) -> Any:
        return super()._do_request(
            *args, **{"timeout": (_CONNECT_SECONDS, _ANSWER_SECONDS), **options}
        )


def _headers() -> dict[str, str]:
    """The token from the environment, whatever RAY_AUTH_MODE says here."""
    token, path = os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not token and path:
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ExecutorError(
                f"RAY_AUTH_TOKEN_PATH: {path} cannot be read ({type(error).__name__}); correct it"
            ) from None
    if not token:
        return {}
    if not token.isascii() or not token.isprintable():
        raise ExecutorError("the Ray token holds characters that no HTTP header may; set another")
    return {"Authorization": f"Bearer {token}"}


def _checked(address: str) -> str:
    for name in _REDIRECTIONS:
        os.environ.pop(name, None)
    address = address if "://" in address else f"http://{address}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ExecutorError(
            f"--address must be that of the cluster's dashboard, such as http://head:8265, "
            f"not {address.rpartition('@')[2]}"
        )
    return address.rstrip("/")


def _first_line(error: Exception) -> str:
    """Ray's message, without its server's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return re.sub(r"(?i)bearer \S+", "Bearer …", text)[:300]
