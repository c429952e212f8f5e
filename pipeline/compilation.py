"""How many programs this process is compiling at this moment, for whoever watches a run.

JAX announces the beginning and the end of each compilation, in the thread that compiles; reading a
program from the cache on the disk counts as well, and takes no time. Nothing here decides a result.
"""

from __future__ import annotations

import threading

_COMPILED = "/jax/core/compile/backend_compile_duration"
"""The event of a compilation: a scalar when it begins, a duration when it ends, however it ends."""

_lock = threading.Lock()
_under_way = 0
_watches = False


def watch_compilation() -> None:
    """Begin to count; again is harmless. Imports JAX."""
    global _watches
    from jax import monitoring

    with _lock:
        if _watches:
            return
        _watches = True
    monitoring.register_scalar_listener(_began)
    monitoring.register_event_duration_secs_listener(_ended)


def num_compiling() -> int:
    """Programs that are being compiled now; 0 where nobody watches."""
    return _under_way


def _began(event: str, value: float, **kwargs: str | int) -> None:  # noqa: ARG001
    _count(event, 1)


def _ended(event: str, duration_secs: float, **kwargs: str | int) -> None:  # noqa: ARG001
    _count(event, -1)


def _count(event: str, change: int) -> None:
    global _under_way
    if event == _COMPILED:
        with _lock:
            # What began before anyone watched may end now.
            _under_way = max(0, _under_way + change)
