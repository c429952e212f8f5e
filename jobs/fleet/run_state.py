"""Where one run stands, from storage alone: no cluster need be alive to tell."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import DamagedObjectError
from pipeline.plan import PLAN_KEY, read_plan
from pipeline.run import lease
from pipeline.run.events import EVENTS_PREFIX, pace, read_events
from pipeline.run.records import ARTIFACT_PREFIX, MANIFEST_KEY, RECORDS_PREFIX
from pipeline.storage.object_store import ObjectStore

State = Literal["not started", "planning", "running", "silent", "stopped", "finished"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """One run.

    Attributes:
        state: "running" has a driver that showed itself within a lease's term; "silent" has one
            that did not, and did not say that it ended; "stopped" has none.
        parts_done, parts: committed files of weights, and how many there will be.
        seconds_a_part: of the latest driver, on average.
        seconds_left: at that pace.
        heartbeat_seconds: since a driver last showed itself, by the clocks of store and reader.
        source_bytes, stored_bytes: of the weights before, and of those that are committed.
        text: what the latest driver said last, or what is wrong.
    """

    state: State
    parts_done: int = 0
    parts: int | None = None
    seconds_a_part: float | None = None
    seconds_left: float | None = None
    heartbeat_seconds: float | None = None
    source_bytes: int | None = None
    stored_bytes: int | None = None
    text: str = ""


def run_state(store: ObjectStore, *, term_seconds: float = lease.TERM_SECONDS) -> RunState:
    """Look at the run at the store's root.

    Args:
        term_seconds: silence after which a driver is taken to be dead.

    Raises:
        StorageError: the store cannot be used.
    """
    known = store.versions()
    done = sum(1 for key in known if key.startswith(RECORDS_PREFIX))
    stored = sum(
        version.size_bytes
        for key, version in known.items()
        if key.startswith(f"{ARTIFACT_PREFIX}model_") and key.endswith(".weights.h5")
    )
    beats = [version.modified for key, version in known.items() if key.startswith(lease.PREFIX)]
    heartbeat = max(0.0, time.time() - max(beats)) if beats else None
    if MANIFEST_KEY in known:
        return RunState(
            state="finished",
            parts_done=done,
            parts=done,
            heartbeat_seconds=heartbeat,
            stored_bytes=stored,
        )
    seen = lease.find_latest(store)
    driven: State = "stopped"
    if not seen.is_over:
        driven = "silent" if heartbeat is None or heartbeat > term_seconds else "running"
    if PLAN_KEY not in known:
        nothing: State = "planning" if driven == "running" else "not started"
        return RunState(state=nothing, heartbeat_seconds=heartbeat)
    try:
        plan = read_plan(store)
    except DamagedObjectError as error:
        return RunState(state="stopped", parts_done=done, text=str(error))
    logs = sorted(key for key in known if key.startswith(EVENTS_PREFIX))
    found = pace(read_events(store, logs[-1:]))
    left = None
    if found.seconds_per_part is not None and driven == "running":
        left = found.seconds_per_part * (len(plan.parts) - done)
    return RunState(
        state=driven,
        parts_done=done,
        parts=len(plan.parts),
        seconds_a_part=found.seconds_per_part,
        seconds_left=left,
        heartbeat_seconds=heartbeat,
        source_bytes=sum(part.source_bytes for part in plan.parts),
        stored_bytes=stored,
        text=found.text,
    )
