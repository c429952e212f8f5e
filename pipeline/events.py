"""What happened when and where: for people, and never read to decide anything.

Each invocation writes one file below `events/`, a JSON object a line.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import secrets
from collections import Counter
from typing import Any

from pipeline.plan import Plan
from pipeline.resources import Resources
from pipeline.run import Report, Step
from pipeline.storage.object_store import ObjectStore

EVENTS_PREFIX = "events/"


class EventLog:
    """Collects a run's events, and writes them whenever a part was committed.

    Attributes:
        seconds: of work by stage, all workers together.
    """

    def __init__(
        self, store: ObjectStore, plan: Plan, resources: Resources, epoch: int | None = None
    ) -> None:
        """Args: epoch: of the lease under which the run is driven; None where it is finished."""
        now = datetime.datetime.now(datetime.UTC)
        self._store = store
        self._key = f"{EVENTS_PREFIX}{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}.jsonl"
        self._lines: list[str] = []
        self.seconds: Counter[str] = Counter()
        self._add(
            "started",
            plan_digest=plan.digest,
            host=platform.node(),
            process=os.getpid(),
            epoch=epoch,
            **dataclasses.asdict(resources),
        )

    def also(self, report: Report) -> Report:
        """A report that goes here and there."""

        def both(step: Step) -> None:
            self.seconds.update(step.seconds)
            values: dict[str, Any] = {"part": step.part, "text": step.text}
            if step.record is not None:
                values["size_bytes"] = step.record.size_bytes
            self._add(step.event, seconds=step.seconds, **values)
            if step.event != "resumed":
                self._write()
            report(step)

        return both

    def close(self, summary: dict[str, Any]) -> None:
        """Write the last line: what the invocation amounts to."""
        self._add("summary", summary=summary)
        self._write()

    def _add(self, event: str, **values: Any) -> None:
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        known = {name: value for name, value in values.items() if value not in (None, "", {})}
        self._lines.append(json.dumps({"time": time, "event": event, **known}))

    def _write(self) -> None:
        self._store.put(self._key, ("\n".join(self._lines) + "\n").encode())
