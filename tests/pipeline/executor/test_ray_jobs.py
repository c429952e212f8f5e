"""How submission copes with a cluster's dashboard that is starting, failing or absent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from pipeline.executor.protocol import ExecutorError
from pipeline.executor.ray_jobs import RayJobs


class _Head(BaseHTTPRequestHandler):
    """A head's dashboard, as far as submitting asks; refuses as often as it is told to."""

    refusals: list[str]
    submitted: list[str]

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": ray.__version__, "ray_commit": ""}
        self._answer(200, json.dumps(version if self.path == "/api/version" else []))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refusals:
            self._answer(500, self.refusals.pop(0))
            return
        self.submitted.append(asked["submission_id"])
        self._answer(200, json.dumps({"job_id": "1", "submission_id": asked["submission_id"]}))

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def head() -> Iterator[tuple[str, type[_Head]]]:
    seen = type("Head", (_Head,), {"refusals": [], "submitted": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), seen)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_head_whose_agents_are_not_up_yet_is_asked_again(
    head: tuple[str, type[_Head]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.executor.ray_jobs._POLL_SECONDS", 0.01)
    address, seen = head
    seen.refusals += ["No available agent to submit job, please try again later."] * 3
    RayJobs(address).submit("run-attempt1", "quantfleet --version", {})
    assert seen.submitted == ["run-attempt1"]
    assert not seen.refusals


def test_other_refusals_are_final(head: tuple[str, type[_Head]]) -> None:
    address, seen = head
    seen.refusals += ["the disk is full"] * 2
    with pytest.raises(ExecutorError, match=r"refuses: .*the disk is full"):
        RayJobs(address).submit("run-attempt1", "quantfleet --version", {})
    assert seen.refusals == ["the disk is full"]
    assert not seen.submitted
