"""Which process this is, so that another on the same machine can tell whether it still lives."""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


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
