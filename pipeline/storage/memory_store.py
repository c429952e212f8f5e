"""A store in this process's memory, for tests and trials."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

from pipeline.storage.backend import Backend, Version

_objects: dict[str, tuple[bytes, Version]] = {}
_lock = threading.Lock()
_counter = itertools.count(1)


class MemoryBackend(Backend):
    """Bytes in a dictionary shared by the whole process, as `memory://` promises."""

    def __init__(self, root: str) -> None:
        self._root = f"{root}/"

    def read(self, key: str, num_bytes: int | None) -> bytes:  # noqa: ARG002 - for remote stores
        return self._find(key)[0]

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        return self.read(key, None)[start:stop]

    def write(self, key: str, data: bytes) -> None:
        with _lock:
            self._store(key, data)

    def create(self, key: str, data: bytes) -> None:
        with _lock:
            if self._root + key in _objects:
                raise FileExistsError(key)
            self._store(key, data)

    def replace(self, key: str, data: bytes, expected: bytes) -> None:
        with _lock:
            if self.read(key, None) != expected:
                raise FileExistsError(key)
            self._store(key, data)

    def version(self, key: str) -> Version:
        return self._find(key)[1]

    def versions(self, prefix: str) -> Iterator[tuple[str, Version]]:
        with _lock:
            found = dict(_objects)
        for name, (_, version) in found.items():
            if name.startswith(self._root + prefix):
                yield name.removeprefix(self._root), version

    def delete(self, key: str) -> None:
        with _lock:
            _objects.pop(self._root + key, None)

    def _find(self, key: str) -> tuple[bytes, Version]:
        found = _objects.get(self._root + key)
        if found is None:
            raise FileNotFoundError(key)
        return found

    def _store(self, key: str, data: bytes) -> None:
        token = str(next(_counter))
        version = Version(token=token, size_bytes=len(data), modified=time.time())
        _objects[self._root + key] = bytes(data), version
