"""An S3 server of objects in memory: listings by pages, reads and writes, with a latency.

Not moto, which looks through every key of a bucket for each page, and so cannot hold a large
catalog. Of the protocol it has what a catalog's decisions need: ListObjectsV2 in key order, GET and
HEAD with ranges, and plain PUT and DELETE. Signatures are not checked. It counts what it is asked.
"""

from __future__ import annotations

import asyncio
import bisect
import datetime
import hashlib
import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from pipeline.storage.backend import Backend, Version

PAGE_LENGTH = 1000
_DATE = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


class Bucket:
    """Keys in order, with contents; equal contents are held once. For several threads."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._contents: dict[str, bytes] = {}
        self._tags: dict[bytes, str] = {}
        self._keys: list[str] = []

    def put(self, key: str, data: bytes) -> None:
        self._tags.setdefault(data, hashlib.md5(data, usedforsecurity=False).hexdigest())
        with self._changing:
            if key not in self._contents:
                bisect.insort(self._keys, key)
            self._contents[key] = data

    def get(self, key: str) -> bytes | None:
        return self._contents.get(key)

    def delete(self, key: str) -> None:
        with self._changing:
            if self._contents.pop(key, None) is not None:
                del self._keys[bisect.bisect_left(self._keys, key)]

    def tag(self, data: bytes) -> str:
        return self._tags[data]

    def page(self, prefix: str, after: str, number: int) -> tuple[list[str], bool]:
        """The first keys with a prefix after another, and whether there are more."""
        with self._changing:
            start = bisect.bisect_left(self._keys, prefix)
            if after:
                start = max(start, bisect.bisect_right(self._keys, after))
            near = self._keys[start : start + number + 1]
        found = list(itertools.takewhile(lambda key: key.startswith(prefix), near))
        return found[:number], len(found) > number

    def __len__(self) -> int:
        return len(self._contents)


class BucketBackend(Backend):
    """A store in such a bucket, written directly; its tokens are those of `RemoteBackend`."""

    def __init__(self, bucket: Bucket, folder: str) -> None:
        self._bucket, self._folder = bucket, f"{folder}/"

    def read(self, key: str, num_bytes: int | None) -> bytes:
        data = self._bucket.get(self._folder + key)
        if data is None:
            raise FileNotFoundError(key)
        return data

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        return self.read(key, None)[start:stop]

    def write(self, key: str, data: bytes) -> None:
        self._bucket.put(self._folder + key, data)

    def create(self, key: str, data: bytes) -> None:
        if self._bucket.get(self._folder + key) is not None:
            raise FileExistsError(key)
        self.write(key, data)

    def replace(self, key: str, data: bytes, expected: bytes) -> None:
        if self.read(key, None) != expected:
            raise FileExistsError(key)
        self.write(key, data)

    def version(self, key: str) -> Version:
        data = self.read(key, None)
        token = f"{self._bucket.tag(data)}-{len(data)}"
        return Version(token=token, size_bytes=len(data), modified=_DATE.timestamp())

    def versions(self, prefix: str) -> Iterator[tuple[str, Version]]:
        keys, _ = self._bucket.page(self._folder + prefix, "", len(self._bucket))
        for key in (key.removeprefix(self._folder) for key in keys):
            yield key, self.version(key)

    def delete(self, key: str) -> None:
        self._bucket.delete(self._folder + key)


class PagedStore:
    """The server of one bucket, in a thread.

    Attributes:
        requests: so far, by kind: list, get, head, put, delete.
        latency_seconds: after which a request is answered.
        url: its endpoint.
    """

    def __init__(self, bucket: Bucket, latency_seconds: float) -> None:
        self.requests: Counter[str] = Counter()
        self.url = ""
        self._bucket, self.latency_seconds = bucket, latency_seconds
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode("latin-1").rstrip().split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, target, _ = first.split(" ")
                await asyncio.sleep(self.latency_seconds)
                status, more, content = self._answer(method, target, headers, body)
                size = len(content)
                lines = [f"HTTP/1.1 {status} x", f"Content-Length: {size}", *more, "", ""]
                if method == "HEAD":
                    content = b""
                writer.write("\r\n".join(lines).encode() + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[str], bytes]:
        parts = urlsplit(target)
        key = unquote(parts.path).strip("/").partition("/")[2]
        if method == "GET" and not key:
            self.requests["list"] += 1
            return 200, ["Content-Type: application/xml"], self._list(parse_qs(parts.query))
        self.requests[method.lower()] += 1
        if method == "PUT":
            self._bucket.put(key, body)
            return 200, [f'ETag: "{self._bucket.tag(body)}"'], b""
        if method == "DELETE":
            self._bucket.delete(key)
            return 204, [], b""
        data = self._bucket.get(key)
        if data is None:
            return 404, [], b"<Error><Code>NoSuchKey</Code></Error>" if method == "GET" else b""
        known = [f'ETag: "{self._bucket.tag(data)}"', f"Last-Modified: {_DATE:%a, %d %b %Y %T} GMT"]
        given = headers.get("range", "")
        if not given:
            return 200, known, data
        start, _, end = given.removeprefix("bytes=").partition("-")
        found = data[int(start) : int(end) + 1 if end else None]
        if not found:
            return 416, [], b"<Error><Code>InvalidRange</Code></Error>"
        stop = int(start) + len(found) - 1
        return 206, [*known, f"Content-Range: bytes {start}-{stop}/{len(data)}"], found

    def _list(self, query: dict[str, list[str]]) -> bytes:
        def one(name: str) -> str:
            return query.get(name, [""])[0]

        number = min(int(one("max-keys") or PAGE_LENGTH), PAGE_LENGTH)
        after = one("continuation-token") or one("start-after")
        keys, has_more = self._bucket.page(one("prefix"), after, number)
        contents = (
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_DATE:%Y-%m-%dT%H:%M:%S.000Z}"
            f'</LastModified><ETag>"{self._bucket.tag(data)}"</ETag><Size>{len(data)}</Size>'
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key in keys
            if (data := self._bucket.get(key)) is not None
        )
        more = (
            f"<NextContinuationToken>{escape(keys[-1])}</NextContinuationToken>" if has_more else ""
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/'
            f'doc/2006-03-01/"><IsTruncated>{str(has_more).lower()}</IsTruncated>'
            f"<KeyCount>{len(keys)}</KeyCount>{''.join(contents)}{more}</ListBucketResult>"
        ).encode()


@contextmanager
def serve(bucket: Bucket, latency_seconds: float = 0.0) -> Iterator[PagedStore]:
    """Serve a bucket for the block."""
    store = PagedStore(bucket, latency_seconds)
    store.start()
    try:
        yield store
    finally:
        store.stop()
