"""A proxy in front of an HTTP server that makes chosen requests fail as networks and stores do."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = {
    "unavailable": "status 503; the request is not forwarded",
    "broken": "status 500; the request is not forwarded",
    "refused": "the connection is reset; the request is not forwarded",
    "lost": "the request is carried out, but the connection is reset before the response",
    "hang": "there is no response",
    "cut": "the response's body ends early",
    "short": "the response's body is cut in half, and its Content-Length agrees",
    "flip": "one bit of the response's body is flipped",
}


_OWN_HEADERS = {"content-length", "transfer-encoding"}


class FaultProxy:
    """Takes one of FAULTS, or None, from `script` for each request, while there are any.

    Requests without a fault of their own get the fault `always`, if it is set.
    """

    def __init__(self, target_url: str) -> None:
        self.target = urlsplit(target_url).netloc
        self.script: deque[str | None] = deque()
        self.always: str | None = None
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request received."""
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def plan(self, *faults: str | None, always: str | None = None) -> None:
        """Replace the script, and forget the requests received."""
        unknown = {*faults, always} - {*FAULTS, None}
        assert not unknown, unknown
        with self._lock:
            self.script = deque(faults)
            self.always = always
            self.requests.clear()

    def next_fault(self, method: str, path: str) -> str | None:
        with self._lock:
            self.requests.append((method, path))
            fault = self.script.popleft() if self.script else None
            return fault or self.always


@contextmanager
def spoil(target_url: str) -> Iterator[tuple[FaultProxy, str]]:
    """Serve a proxy to `target_url`; yield the proxy and its own URL."""
    proxy = FaultProxy(target_url)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(proxy))
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        proxy.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            match proxy.next_fault(self.command, self.path):
                case "unavailable":
                    self._answer(503, _error("SlowDown"))
                case "broken":
                    self._answer(500, _error("InternalError"))
                case "refused":
                    self._reset()
                case "hang":
                    proxy.closing.wait(60)
                    self._reset()
                case "lost":
                    self._forward(body)
                    self._reset()
                case fault:
                    self._relay(fault, *self._forward(body))

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

        def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(proxy.target, timeout=30)
            # The request's signature covers the Host header, so pass it on unchanged.
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer.status, answer.getheaders(), content

        def _relay(
            self, fault: str | None, status: int, headers: list[tuple[str, str]], content: bytes
        ) -> None:
            if content and fault == "short":
                content = content[: len(content) // 2]
            if content and fault == "flip":
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.send_response_only(status)
            # The body has been read in full; send it with its length, not in chunks.
            ours = {"transfer-encoding"} if self.command == "HEAD" else _OWN_HEADERS
            for name, value in headers:
                if name.lower() not in ours:
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if fault == "cut":
                self.wfile.write(content[: len(content) // 2])
                self._reset()
            elif self.command != "HEAD":
                self.wfile.write(content)

        def _answer(self, status: int, content: bytes) -> None:
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _reset(self) -> None:
            self.close_connection = True
            # Closing without lingering resets the connection instead of ending it in order.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

        def finish(self) -> None:
            quietly(super().finish)

    return Handler


def quietly(close: Callable[[], None]) -> None:
    try:
        close()
    except (OSError, ValueError):  # _reset has closed it
        return


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
