"""A run in a process that dies at a chosen storage operation; see `kill_everywhere`."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from pipeline.calibration.windows import TokenWindows
from pipeline.plan import Plan
from pipeline.planning.make_plan import Planned
from pipeline.storage import local_store
from pipeline.storage.object_store import open_store
from tests.faults.killing import Killer
from tests.pipeline import tiny_runs
from tests.pipeline.late_commits import LateCommits

KEEP_EVERY = 1


@dataclass(frozen=True)
class Given:
    """What every process works from: plain data."""

    plan_json: bytes
    windows: bytes | None

    @classmethod
    def of(cls, scheme: str) -> Given:
        planned = tiny_runs.planned(scheme)
        windows = None if planned.windows is None else planned.windows.to_bytes()
        return cls(planned.plan.to_json(), windows)

    def planned(self) -> Planned:
        windows = None if self.windows is None else TokenWindows.from_bytes(self.windows)
        return Planned(plan=Plan.from_json(self.plan_json), windows=windows, variables=())


def run(folder: str, given: Given, at: int, *, after: bool, late: bool) -> int:
    """Quantize into a folder; the number of storage operations, of a process that lives.

    Args:
        late: a block is committed when the next one is solved.
    """
    make_executor = LateCommits if late else tiny_runs.CountingExecutor
    killer = Killer(lambda: os.kill(os.getpid(), signal.SIGKILL), at=at, after=after)
    original = local_store.LocalBackend

    def watched(root: Path) -> object:
        # The source is read through the same door; only the run's own operations count.
        backend = original(root)
        return killer.wrap(backend) if str(root) == folder else backend

    with mock.patch.object(local_store, "LocalBackend", watched):
        tiny_runs.execute(
            given.planned(),
            open_store(folder),
            workers=2,
            keep_every=KEEP_EVERY,
            make_executor=make_executor,
        )
    return len(killer.seen)
