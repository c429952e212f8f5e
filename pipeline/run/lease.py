"""The lease on a run: one driver at a time, each with a higher number than the one before.

All this needs of a store is create-once. Whoever creates `leases/00007.json` is the seventh driver
and holds the lease until the eighth is created or the holder releases it. A holder overwrites its
own `leases/00007.beat.json` at regular intervals; the others watch that object for change on their
own clocks, so clocks need not agree.

The lease saves work; it does not protect bytes. Every driver of a run writes the same bytes
(see `pipeline.run.commits`), so a driver that was suspended and wakes up too late only wastes time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar, Self, TypeVar

from pydantic import ConfigDict, ValidationError

from pipeline.canonical import canonical_json
from pipeline.errors import (
    DamagedObjectError,
    LeaseHeldError,
    LeaseLostError,
    MissingObjectError,
    StorageError,
)
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import STRICT, adapter_of

PREFIX = "leases/"
TERM_SECONDS = 60.0
"""A driver that is silent for this long loses its run to any driver that waits for it."""
_BEATS_PER_TERM = 6
_POLLS_PER_TERM = 12
_RELEASE_TIMEOUT_SECONDS = 5.0
_MAX_BYTES = 1 << 16

_Stored = TypeVar("_Stored")


@dataclass(frozen=True, kw_only=True)
class LatestLease:
    """The latest lease in storage.

    Attributes:
        epoch: its number; 0 if there is none.
        holder: the process that created it; None if that cannot be read.
        beat: the bytes of its last heartbeat, which change while the holder lives.
    """

    epoch: int
    holder: ProcessIdentity | None = None
    beat: bytes = b""
    released: bool = True

    @property
    def is_over(self) -> bool:
        """Whether the next driver may follow at once: released, or its local process is gone."""
        return self.released or (self.holder is not None and self.holder.is_gone())

    def __str__(self) -> str:
        return str(self.holder or "another driver")


def find_latest(store: ObjectStore) -> LatestLease:
    """Find the latest lease on the run at the store's root."""
    epoch = _latest_epoch(store)
    if epoch == 0:
        return LatestLease(epoch=0)
    data, beat = _read(store, _beat_key(epoch), _Beat)
    _, claim = _read(store, _key(epoch), _Claim)
    return LatestLease(
        epoch=epoch,
        holder=None if claim is None else claim.holder,
        beat=data,
        released=beat is not None and beat.released,
    )


@dataclass
class Lease:
    """The right to drive a run, renewed by a thread until the `with` block ends or it is lost."""

    store: ObjectStore
    epoch: int
    seconds: float = TERM_SECONDS
    _beats: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """Make sure that no other driver has taken over; call this before deleting anything.

        Raises:
            LeaseLostError: another driver has.
        """
        if _latest_epoch(self.store) > self.epoch:
            self._ended.set()
            raise LeaseLostError(
                f"{self.store.root_url}: this driver was silent for {self.seconds:g} s or more, "
                f"and {find_latest(self.store)} has taken the run over; this one stops, "
                "and what is committed stays: to go on from it, repeat the command once that has "
                "ended"
            )

    def release(self) -> None:
        """Let the next driver follow at once."""
        self._ended.set()
        if self._thread is not None:
            # If the store does not answer in time, the next driver waits for a term instead.
            self._thread.join(timeout=_RELEASE_TIMEOUT_SECONDS)

    def start(self) -> Self:
        """Start the thread that renews it."""
        self._beat(released=False)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return self

    def _renew(self) -> None:
        while not self._ended.wait(self.seconds / _BEATS_PER_TERM):
            # If the store is away for a while, work pauses too, and a later beat may arrive.
            with contextlib.suppress(StorageError):
                self._beat(released=False)
        with contextlib.suppress(StorageError):
            self._beat(released=True)

    def _beat(self, *, released: bool) -> None:
        self._beats += 1
        beat = _Beat(beats=self._beats, released=released)
        self.store.put(_beat_key(self.epoch), canonical_json(dataclasses.asdict(beat)))


def acquire(
    store: ObjectStore,
    *,
    seconds: float = TERM_SECONDS,
    wait: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Lease:
    """Become the driver of the run at the store's root for the time of a `with` block.

    Args:
        seconds: silence after which another driver is considered dead.
        wait: until a living driver ends; otherwise only until it shows that it is alive.
        tell: called at most once, with a message that names the driver being waited for.

    Raises:
        LeaseHeldError: another driver is alive, and `wait` is False.
        StorageError: the store cannot be used.
    """
    latest, since, told = find_latest(store), time.monotonic(), False
    while True:
        if latest.is_over or time.monotonic() - since >= seconds:
            # By the nonce, claims of two drivers differ, and a lost acknowledgement is recognized.
            claim = _Claim(holder=this_process(), nonce=secrets.token_hex(16))
            epoch = latest.epoch + 1
            with contextlib.suppress(FileExistsError):  # another driver was faster
                store.create(_key(epoch), canonical_json(dataclasses.asdict(claim)))
                return Lease(store=store, epoch=epoch, seconds=seconds).start()
        elif not told:
            told = True
            tell(f"waiting for {latest}, which drives this run or did until recently")
        time.sleep(seconds / _POLLS_PER_TERM)
        now = find_latest(store)
        if (now.epoch, now.beat) != (latest.epoch, latest.beat):
            latest, since = now, time.monotonic()
            if not (wait or latest.is_over):
                raise LeaseHeldError(
                    f"{store.root_url}: {latest} is at work on this run; start again when "
                    "it has ended"
                )


def epoch_of(key: str) -> int:
    """The number of the lease that an object below PREFIX belongs to; 0 for other objects."""
    name = key.removeprefix(PREFIX).partition(".")[0]
    return int(name) if name.isdecimal() else 0


def _latest_epoch(store: ObjectStore) -> int:
    return max(map(epoch_of, store.list(PREFIX)), default=0)


def _read(store: ObjectStore, key: str, kind: type[_Stored]) -> tuple[bytes, _Stored | None]:
    """An object's bytes and content; a lease that is missing or damaged counts as a silent one."""
    data = b""
    try:
        data = store.get(key, at_most=_MAX_BYTES)
        return data, adapter_of(kind).validate_json(data)
    except (MissingObjectError, DamagedObjectError, ValidationError):
        return data, None


def _key(epoch: int) -> str:
    return f"{PREFIX}{epoch:05d}.json"


def _beat_key(epoch: int) -> str:
    return f"{PREFIX}{epoch:05d}.beat.json"


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """The content of a lease."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    holder: ProcessIdentity
    nonce: str


@dataclass(frozen=True, kw_only=True)
class _Beat:
    """The content of a heartbeat."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    beats: int
    released: bool


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """One process, distinct from every other that ever ran on any machine.

    Attributes:
        host: for messages.
        kernel: this boot of this machine and its PID namespace; "" if unknown.
        process: its process number there.
        started: when it started, in the kernel's ticks; process numbers are reused.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    host: str
    kernel: str
    process: int
    started: int

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    def is_gone(self) -> bool:
        """Whether it ran on this machine and has ended; always False for other machines."""
        is_local = self.kernel != "" and self.kernel == _kernel()
        return is_local and _start_ticks(self.process) != self.started


def this_process() -> ProcessIdentity:
    """The identity of the current process."""
    process = os.getpid()
    return ProcessIdentity(
        host=platform.node(), kernel=_kernel(), process=process, started=_start_ticks(process)
    )


@cache
def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Containers share a kernel, and each numbers its processes anew.
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _start_ticks(process: int) -> int:
    """When a process started; 0 if it has ended, or is a zombie."""
    try:
        # The second field, the program's name in brackets, may hold anything.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
