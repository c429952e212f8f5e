"""Whether this machine has room for a Ray cluster of its own, and what to say where it has not."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from pipeline.executor.allocation import available_memory_bytes
from pipeline.executor.protocol import ExecutorError

_SOCKET = "session_2026-01-01_00-00-00_000000_{process}/sockets/plasma_store"
_LONGEST_SOCKET_BYTES = 107
"""Linux allows no longer path for one."""
_LEAST_BYTES = 1 << 18
_SHARED_MEMORY = Path("/dev/shm")
_REMEDY = "set TMPDIR, or RAY_TMPDIR for Ray alone, to another folder"


def usable_folder() -> Path:
    """The folder for the sockets and logs of a cluster that is to be started here.

    Raises:
        ExecutorError: it cannot be written, is full, or has too long a path.
    """
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_LEAST_BYTES))
            file.flush()
    except OSError as error:
        raise ExecutorError(
            f"{folder}: Ray cannot keep its sockets and logs there ({error.strerror}); free some "
            f"space there, or {_REMEDY}"
        ) from None
    socket = os.fsencode(folder / _SOCKET.format(process=os.getpid()))
    if len(socket) > _LONGEST_SOCKET_BYTES:
        raise ExecutorError(
            f"{folder}: too long a path, by {len(socket) - _LONGEST_SOCKET_BYTES} bytes, for the "
            f"sockets that Ray keeps there; {_REMEDY}"
        )
    return folder


def _folder() -> Path:
    # As Ray chooses it, except that it would take an empty variable for the current folder.
    given = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(given).absolute() / "ray"


def cannot_start(reason: str) -> ExecutorError:
    """What to say where Ray did not start here, with what it may have lacked."""
    folder = _folder()
    has = ", ".join(
        f"{num_bytes / 2**20:.0f} MiB {where}"
        for where, num_bytes in {
            "of memory": available_memory_bytes(),
            f"in {_SHARED_MEMORY}": _free_bytes(_SHARED_MEMORY),
            f"in {folder}": _free_bytes(folder),
        }.items()
    )
    return ExecutorError(
        f"Ray cannot start on this machine: {reason.rstrip('.')}; free are {has}; it takes "
        "250 MiB of memory at least, beside the workers': free some, or give the container more "
        "(docker run --memory, --shm-size)"
    )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.exists() else 0
