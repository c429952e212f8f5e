"""Who drives a run: one driver at a time, each with a higher number than the one before.

Creating an object once is all that this needs of a store. Whoever creates `leases/00007.json` is
the seventh driver and the holder, until somebody creates the eighth, or the holder says that it has
ended. A holder overwrites its own `leases/00007.beat.json` again and again; others watch that for
change on their own clock, so that clocks need not agree.

A lease saves work; it does not guard bytes. Whatever a driver writes is the same whoever writes it
(see `pipeline.run.commits`), so a driver that went to sleep and wakes up too late can only waste
time.

Which process this is, so that another on the same machine can tell whether it still lives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.canonical import canonical_json
from pipeline.errors import (
    DamagedObjectError,
    LeaseHeldError,
    LeaseLostError,
    MissingObjectError,
    StorageError,
)
from pipeline.storage.object_store import ObjectStore

PREFIX = "leases/"
SECONDS = 60.0
"""A driver that is silent for so long has lost its run to whoever waits for it."""
_BEATS_A_TERM = 6
_LOOKS_A_TERM = 12
_LONGEST_FAREWELL_SECONDS = 5.0
_MOST_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What storage says of the latest lease.

    Attributes:
        epoch: its number; 0 where there is none.
        holder: who created it; None where that cannot be read.
        beat: the bytes that it last wrote, which change while it lives.
        released: it has said that it ended.
    """

    epoch: int
    holder: ProcessIdentity | None = None
    beat: bytes = b""
    released: bool = True

    @property
    def is_over(self) -> bool:
        """Whether the next may follow at once: it has ended, or its process here is gone."""
        return self.released or (self.holder is not None and self.holder.is_gone())


def look(store: ObjectStore) -> Seen:
    """Find the latest lease of the run at the store's root."""
    epoch = _latest(store)
    if epoch == 0:
        return Seen(epoch=0)
    beat, said = _read(store, _beat_key(epoch))
    _, holder = _read(store, _key(epoch))
    return Seen(
        epoch=epoch,
        holder=ProcessIdentity.from_dict(holder.get("holder")),
        beat=beat,
        released=said.get("released") is True,
    )


@dataclass
class Lease:
    """The right to drive a run, kept alive by a thread until it is released or lost."""

    store: ObjectStore
    epoch: int
    seconds: float = SECONDS
    _beats: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def check(self) -> None:
        """Make sure that nobody has followed; to be asked before anything is deleted.

        Raises:
            LeaseLostError: somebody has.
        """
        latest = _latest(self.store)
        if latest > self.epoch:
            self._ended.set()
            follower = look(self.store).holder
            raise LeaseLostError(
                f"{self.store.root_url}: this driver was silent for {self.seconds:g} s or more, "
                f"and {follower or 'another driver'} has taken the run over; this one stops, and "
                "nothing is lost"
            )

    def release(self) -> None:
        """Say that this driver has ended, so that the next need not wait."""
        self._ended.set()
        if self._thread is not None:
            # Of a store that does not answer, nobody is told: the next waits for a term.
            self._thread.join(timeout=_LONGEST_FAREWELL_SECONDS)

    def keep(self) -> Lease:
        """Start the thread that keeps it."""
        self._beat(released=False)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def _keep(self) -> None:
        while not self._ended.wait(self.seconds / _BEATS_A_TERM):
            # The store may be away for a while; work pauses too, and the next beat may arrive.
            with contextlib.suppress(StorageError):
                self._beat(released=False)
        with contextlib.suppress(StorageError):
            self._beat(released=True)

    def _beat(self, *, released: bool) -> None:
        self._beats += 1
        said = {"beats": self._beats, "released": released}
        self.store.put(_beat_key(self.epoch), canonical_json(said))


def acquire(
    store: ObjectStore,
    *,
    seconds: float = SECONDS,
    wait: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Lease:
    """Become the driver of the run at the store's root.

    Args:
        seconds: silence after which another driver is taken to be dead.
        wait: for a living driver to end; otherwise only until it shows that it lives.
        tell: is told, once, who is waited for.

    Raises:
        LeaseHeldError: another driver lives, and `wait` is False.
        StorageError: the store cannot be used.
    """
    seen, since = look(store), time.monotonic()
    told = False
    while True:
        if seen.is_over or time.monotonic() - since >= seconds:
            lease = _follow(store, seen.epoch, seconds)
            if lease is not None:
                return lease
        elif not told:
            told = True
            tell(f"{_name(seen)} drives this run, or did until now; waiting to see whether it ends")
        time.sleep(seconds / _LOOKS_A_TERM)
        now = look(store)
        if (now.epoch, now.beat) != (seen.epoch, seen.beat):
            seen, since = now, time.monotonic()
            if not (wait or seen.is_over):
                raise LeaseHeldError(
                    f"{store.root_url}: {_name(seen)} is at work on this run; start again when it "
                    "has ended"
                )


def _name(seen: Seen) -> str:
    return str(seen.holder or "another driver")


def _follow(store: ObjectStore, epoch: int, seconds: float) -> Lease | None:
    """The lease after `epoch`, unless somebody else was faster."""
    # The nonce makes two drivers' bytes differ, and a lost acknowledgement our own success.
    claim = {"holder": this_process().to_dict(), "nonce": secrets.token_hex(16)}
    try:
        store.create(_key(epoch + 1), canonical_json(claim))
    except FileExistsError:
        return None
    return Lease(store=store, epoch=epoch + 1, seconds=seconds).keep()


def epoch_of(key: str) -> int:
    """The number of the lease that an object below PREFIX belongs to; 0 of none."""
    name = key.removeprefix(PREFIX).partition(".")[0]
    return int(name) if name.isdecimal() else 0


def _latest(store: ObjectStore) -> int:
    return max(map(epoch_of, store.list(PREFIX)), default=0)


def _read(store: ObjectStore, key: str) -> tuple[bytes, dict[str, Any]]:
    """An object's bytes and content; nothing of either where it is missing or damaged.

    A lease that cannot be read is one that is silent.
    """
    try:
        data = store.get(key, at_most=_MOST_BYTES)
    except (MissingObjectError, DamagedObjectError):
        return b"", {}
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data, {}
    return data, content if isinstance(content, dict) else {}


def _key(epoch: int) -> str:
    return f"{PREFIX}{epoch:05d}.json"


def _beat_key(epoch: int) -> str:
    return f"{PREFIX}{epoch:05d}.beat.json"


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """One process, of all that ever ran on any machine.

    Attributes:
        host: for people.
        kernel: this boot of this machine and its space of process numbers; "" where unknown.
        process: its number there.
        started: when it started, in the kernel's own ticks; numbers are used again.
    """

    host: str
    kernel: str
    process: int
    started: int

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    def is_gone(self) -> bool:
        """Whether it was a process of this machine and is no more; never true of other machines."""
        here = this_process()
        if not self.kernel or self.kernel != here.kernel:
            return False
        return _started(self.process) != self.started

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> ProcessIdentity | None:
        """Read what `to_dict` gave; None of anything else."""
        if not isinstance(values, dict) or set(values) != {f.name for f in dataclasses.fields(cls)}:
            return None
        if not all(isinstance(values[name], str) for name in ("host", "kernel")):
            return None
        if not all(isinstance(values[name], int) for name in ("process", "started")):
            return None
        return cls(**values)


def this_process() -> ProcessIdentity:
    """The identity of the process that asks."""
    process = os.getpid()
    return ProcessIdentity(
        host=platform.node(), kernel=_kernel(), process=process, started=_started(process)
    )


@cache
def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Containers share a kernel, and each counts its processes anew.
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _started(process: int) -> int:
    """When a process started; 0 where it is no more, or only waits to be buried."""
    try:
        # The second field, the program's name in brackets, may hold anything.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
