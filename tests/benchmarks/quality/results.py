"""A folder of results: a line of JSON for every quantized model that was judged, never changed.

A line's key is a digest of all that decides its numbers, so what is there is not measured again,
and a run that was killed goes on where it stood. Where a row was measured by several versions of a
quantizer, its newest lines count.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

METRICS = ("float_nll", "nll", "kl", "kl_p99", "flips")
"""Of each window: mean negative log-likelihood in the float model and in this one, mean KL (nats),
the 99th percentile of KL over its tokens, and the share of tokens at which the likeliest next one
is not the float model's."""
FULL, QUICK = "full", "4 blocks"
"""Forms of the measure."""
_DIGITS = 7


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One quantized model.

    Attributes:
        key: see `digest`.
        row, draw: what was quantized; see `rows`.
        form: of the measure: FULL or QUICK.
        version: of the quantizer.
        seconds: that quantizing took, by what they include; on a busy machine they say little.
        machine: kind of processor and number of cores.
        values: by kind of text and metric, a value per window.
    """

    key: str
    row: str
    draw: int
    form: str
    version: str
    seconds: dict[str, float]
    machine: str
    values: dict[str, dict[str, list[float]]]


class Results:
    """The lines of a folder's judged.jsonl."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "judged.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[Judged]:
        """All complete lines; a last one without its end is of a run that was killed."""
        if not self._file.exists():
            return []
        lines = self._file.read_text(encoding="utf-8").split("\n")[:-1]
        return [Judged(**json.loads(line)) for line in lines]

    def has(self, key: str) -> bool:
        return any(judged.key == key for judged in self.read())

    def append(self, judged: Judged) -> None:
        """Write a line, in place of one without its end; processes may share a folder."""
        line = json.dumps(dataclasses.asdict(judged), sort_keys=True) + "\n"
        with self._file.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def of_row(self, row: str, form: str) -> dict[int, Judged]:
        """The newest version's results by draw."""
        found = [judged for judged in self.read() if (judged.row, judged.form) == (row, form)]
        if not found:
            return {}
        newest = found[-1].version
        return {judged.draw: judged for judged in found if judged.version == newest}


def values(judged: dict[int, Judged], draws: list[int], text: str, metric: str) -> NDArray[Any]:
    """Values [draws, windows] of one kind of text."""
    return np.array([judged[draw].values[text][metric] for draw in draws])


def rounded(values: NDArray[Any]) -> list[float]:
    """As they are kept."""
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def digest(decides: dict[str, Any]) -> str:
    """A key."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
