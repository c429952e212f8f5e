"""A child process on this machine with a worker's environment: it plans while Ray starts."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

from pipeline.executor.protocol import ExecutorError, P, T

# The parent's path of modules, since the folder where it was started may be anybody's. Python is
# told to put no folder of its own before them.
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from pipeline.executor.local_process import serve
serve(int(sys.argv[1]))
"""


class LocalProcess:
    """Runs functions in a child process, one after the other (see `local_process`)."""

    def __init__(
        self, process: subprocess.Popen[bytes], connection: Connection, stderr: BinaryIO
    ) -> None:
        self._process = process
        self._connection = connection
        self._stderr = stderr

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a module's function in the child; ExecutorError if that is gone."""
        try:
            self._connection.send((function, args, kwargs))
            succeeded, outcome = self._connection.recv()
        except (EOFError, OSError):
            raise ExecutorError(
                f"the process that plans ended early ({self._last_words()}); check this "
                "machine's memory, then try again"
            ) from None
        if not succeeded:
            raise outcome
        result: T = outcome
        return result

    @property
    def num_processes(self) -> int:
        return 1

    def run_each(self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """Call a function with one argument after the other."""
        return [self.run(function, *args) for args in arguments]

    def stop(self) -> None:
        """End the child, whatever it does."""
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        status = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").split("\n")
        text = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"exit status {status}" + (f": {text[:300]}" if text else "")


@contextlib.contextmanager
def local_process(environment: Mapping[str, str]) -> Iterator[LocalProcess]:
    """Start a child process for the block; it is up some time later."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as stderr, Connection(ours.detach()) as connection:
        with theirs:
            descriptor = theirs.fileno()
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CHILD, str(descriptor), json.dumps(sys.path)],
                env={**os.environ, **environment},
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                # Ctrl-C is for this process, which ends the child.
                start_new_session=True,
            )
        child = LocalProcess(process, connection, stderr)
        try:
            yield child
        finally:
            child.stop()


def serve(descriptor: int) -> None:
    """Run what the parent sends, until it closes the connection."""
    connection = Connection(descriptor)
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            outcome = True, function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - raised again in the parent
            error.add_note("".join(traceback.format_exception(error)))
            outcome = False, error
        connection.send(outcome)
