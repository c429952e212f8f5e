"""What safety costs of a run: checksums, leases, activations kept, the last look at everything.

    python -m tests.benchmarks.protocol [--preset FOLDER --recipe FILE]

A whole run of a real model in this process, by one worker. Calls that only the protocol needs are
timed where they are made, one inside another counted once; the rest of the run is the work itself.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline.artifact.parts
import pipeline.run.driver
import pipeline.weights.digests
from pipeline.recipe.recipe_file import load_recipe
from pipeline.remote_planning import plan_run
from pipeline.run import activations, lease
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.storage.object_store import open_store
from pipeline.worker.worker import Worker
from tests.pipeline.local_executor import LocalExecutor

# Of the beats' thread nothing is counted: it mostly waits.
_PROTOCOL: tuple[tuple[Any, str, str], ...] = (
    (pipeline.weights.digests, "variable_digest", "checksum of the source"),
    (pipeline.artifact.parts, "sha256", "checksum of the result"),
    (activations, "save", "activations kept"),
    (activations, "finish", "activations kept"),
    (activations, "discard", "activations kept"),
    (activations, "latest", "activations kept"),
    (pipeline.run.driver, "committed_parts", "what is committed"),
    (lease.Lease, "check", "lease"),
    (lease, "acquire", "lease"),
    (lease.Lease, "release", "lease"),
)


class Clock:
    """Seconds by name; what runs inside another is the other's."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._depth = threading.local()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def around(*args: Any, **options: Any) -> Any:
            inside = getattr(self._depth, "value", 0)
            self._depth.value = inside + 1
            start = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self._depth.value = inside
                if not inside:
                    self.seconds[name] += time.perf_counter() - start  # type: ignore[assignment]

        return around


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="out/demo/smollm2")
    parser.add_argument("--recipe", default="tests/demo/recipe.yaml")
    arguments = parser.parse_args()
    clock = Clock()
    for place, name, label in _PROTOCOL:
        setattr(place, name, clock.timed(label, getattr(place, name)))
    original = pipeline.worker.worker.finalize  # type: ignore[attr-defined]
    pipeline.worker.worker.finalize = clock.timed("last look", original)  # type: ignore[attr-defined]
    preset = str(Path(arguments.preset).resolve())
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        plan, windows = LocalExecutor([]).run(plan_run, preset, load_recipe(arguments.recipe), 2)
        claim(store, plan, windows)
        start = time.perf_counter()
        held = lease.acquire(store)
        executor = LocalExecutor([Worker(plan, preset, folder)])
        quantize(plan, store, executor, lambda step: None, check_lease=held.check)
        held.release()
        whole = time.perf_counter() - start
    never = {label for *_, label in _PROTOCOL} - clock.seconds.keys()
    if never:
        raise SystemExit(f"{', '.join(sorted(never))}: never called where it is timed")
    for name, seconds in sorted(clock.seconds.items()):
        print(f"{name:24} {seconds:7.2f} s {seconds / whole:7.2%}")
    total = sum(clock.seconds.values())
    print(f"{'all of it':24} {total:7.2f} s {total / whole:7.2%} of {whole:.1f} s")


if __name__ == "__main__":
    main()
