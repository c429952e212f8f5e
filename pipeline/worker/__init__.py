"""What one worker does, with JAX and Keras; the driver imports none of it."""

from __future__ import annotations

from collections.abc import Callable


def start_worker(source_url: str, run_url: str) -> Callable[[], object]:
    """Import what takes long; returns a function that opens the worker, once the run is claimed.

    Raises:
        ExecutorError: Keras runs on another backend.
    """
    import keras

    from pipeline.executor.protocol import ExecutorError
    from pipeline.plan import read_plan
    from pipeline.storage.object_store import open_store
    from pipeline.worker.worker import Worker

    if keras.backend.backend() != "jax":
        raise ExecutorError(f"a worker started with Keras on {keras.backend.backend()}, not JAX")
    # The plan comes from storage: it is too large for an argument that restarts must find again.
    return lambda: Worker(read_plan(open_store(run_url)), source_url, run_url)
