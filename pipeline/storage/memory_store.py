"""A store in this process' memory: for tests and trials, gone when the process ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

_objects: dict[str, bytes] = {}
_lock = threading.Lock()


class MemoryBackend:
    """Bytes in a dict that the whole process shares, as `memory://` promises."""

    def __init__(self, root: str) -> None:
        self._root = f"{root}/"

    def read(self, key: str, num_bytes: int | None) -> bytes:  # noqa: ARG002 - of use afar
        data = _objects.get(self._root + key)
        if data is None:
            raise FileNotFoundError(key)
        return data

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        return self.read(key, None)[start:stop]

    def size(self, key: str) -> int:
        return len(self.read(key, None))

    def write(self, key: str, data: bytes) -> None:
        with _lock:
            _objects[self._root + key] = bytes(data)

    def create(self, key: str, data: bytes) -> None:
        with _lock:
            if self._root + key in _objects:
                raise FileExistsError(key)
            _objects[self._root + key] = bytes(data)

    def list(self, prefix: str) -> Iterator[str]:
        with _lock:
            names = list(_objects)
        for name in names:
            if name.startswith(self._root + prefix):
                yield name.removeprefix(self._root)

    def delete(self, key: str) -> None:
        with _lock:
            _objects.pop(self._root + key, None)

    def leftovers(self) -> Iterator[str]:
        return iter(())

    def sweep(self, leftover: str) -> None:
        raise AssertionError(f"{leftover}: nothing is ever left over")
