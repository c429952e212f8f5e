"""A store of this process that counts what it is asked, and ends the process on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.storage.memory_store import MemoryBackend

OPERATIONS = ("read", "read_range", "version", "write", "create", "list", "delete")
WRITES = ("write", "create", "delete")


class Killed(BaseException):
    """What a process does not survive; no `except Exception` stops it either."""


@dataclass
class Killer:
    """Counts operations, and at the one that it waits for, calls `end`.

    Attributes:
        at: number of the operation, from 1; 0 for none.
        after: end after it was carried out, not before.
        seen: (operation, key) in order.
    """

    end: Callable[[], None]
    at: int = 0
    after: bool = False
    seen: list[tuple[str, str]] = field(default_factory=list)

    def wrap(self, backend: Any) -> Any:
        return _Watched(backend, self)

    def pass_by(self, operation: str, key: str, carry_out: Callable[[], Any]) -> Any:
        self.seen.append((operation, key))
        mine = len(self.seen) == self.at
        if mine and not self.after:
            self.end()
        try:
            return carry_out()
        finally:  # also after one that finds nothing
            if mine and self.after:
                self.end()


class _Watched:
    def __init__(self, backend: Any, killer: Killer) -> None:
        self._backend = backend
        self._killer = killer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in OPERATIONS:
            return found

        def watched(key: str, *rest: Any) -> Any:
            def carry_out() -> Any:
                answer = found(key, *rest)
                return list(answer) if isinstance(answer, Iterator) else answer

            return self._killer.pass_by(name, key, carry_out)

        return watched


def kill() -> None:
    """Die, as far as a part of a process can."""
    raise Killed


def killing_memory(killer: Killer) -> Callable[[str], Any]:
    """What to put in the place of MemoryBackend."""
    return lambda root: killer.wrap(MemoryBackend(root))
