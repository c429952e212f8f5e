"""Measure rows, draw by draw, into a folder of results."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import keras_hub

from pipeline.calibration.windows import TokenWindows
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.planning.token_windows import token_windows
from pipeline.recipe.recipe import Calibration
from tests.benchmarks.quality.judge import Judge
from tests.benchmarks.quality.quantizing import Source, forget, quantize, version
from tests.benchmarks.quality.results import FULL, QUICK, Judged, Results, digest
from tests.benchmarks.quality.rows import Row
from tests.benchmarks.quality.weights import put_weights, variable_shapes
from tests.models.smollm2 import smollm2_preset
from tests.models.smollm2_huggingface import smollm2_directory
from tests.models.smollm2_weights import FILE_SHA256
from tests.models.texts import (
    calibration_documents,
    code,
    documentation,
    evaluation_documents,
    novels,
)

KINDS = {
    "manual": lambda _: evaluation_documents(),
    "documentation": documentation,
    "novels": novels,
    "code": code,
}
"""What models are judged on, by kind."""
SOURCES = {
    "manual": lambda _: calibration_documents(),
    "novels": lambda cache: novels(cache, for_calibration=True),
}
"""What models are calibrated on."""
WINDOW_LENGTH = 128
NUM_WINDOWS, QUICK_WINDOWS = 64, 16
QUICK_BLOCKS = 4


class Measure:
    """The model, the texts and the judge.

    Args:
        folder: for results, and below work/ for models and texts.
        environments: the folder of the peers' environments, if rows need them.
        quick: whether few blocks are quantized, and judged on few windows.
    """

    def __init__(self, folder: Path, environments: Path | None, *, quick: bool) -> None:
        self.results = Results(folder)
        self._work = folder.resolve() / "work"
        preset = smollm2_preset(self._work / "preset", dither=True)
        self._preset = read_preset(str(preset))
        self._skeleton = build_skeleton(self._preset)
        self.form = QUICK if quick else FULL
        num_blocks = QUICK_BLOCKS if quick else None
        self._texts = {
            name: _written(self._work / "texts" / f"calibrate-{name}.jsonl", documents, self._work)
            for name, documents in SOURCES.items()
        }
        windows = {
            kind: self._windows(
                Calibration(
                    texts=(
                        str(_written(self._work / "texts" / f"{kind}.jsonl", given, self._work)),
                    ),
                    num_samples=NUM_WINDOWS,
                    sequence_length=WINDOW_LENGTH,
                )
            ).tokens
            for kind, given in KINDS.items()
        }
        self._task: Any = keras_hub.models.CausalLM.from_preset(str(preset))
        self.judge = Judge(
            self._task,
            f"{FILE_SHA256} dithered",
            windows,
            self._work,
            num_windows=QUICK_WINDOWS if quick else None,
        )
        self._source = Source(
            preset=smollm2_preset(
                self._work / f"preset-{num_blocks}", dither=True, num_blocks=num_blocks
            )
            if quick
            else preset,
            directory=_huggingface(
                self._work / f"huggingface-{self.form.replace(' ', '-')}", num_blocks
            ),
            shapes=variable_shapes(self._task),
            environments=environments,
        )

    def run(self, row: Row, draw: int) -> Judged | None:
        """Measure a row unless it is there; None if it is."""
        calibration = row.calibration(self._texts, draw)
        windows = self._windows(calibration)
        quantizer = version(row)
        key = digest(
            {
                "row": row.to_json(),
                "version": quantizer,
                "calibration": windows.digest,
                "judge": self.judge.digest,
                "form": self.form,
            }
        )
        if self.results.has(key):
            return None
        values, seconds = self._measured(row, windows, calibration, self._work / key)
        judged = Judged(
            key=key,
            row=str(row),
            draw=draw,
            form=self.form,
            version=quantizer,
            seconds={name: round(value, 1) for name, value in seconds.items()},
            machine=f"{platform.machine()}, {os.cpu_count()} cores",
            values=values,
        )
        self.results.append(judged)
        forget(self._work / key)
        return judged

    def _measured(
        self, row: Row, windows: TokenWindows, calibration: Calibration, work: Path
    ) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
        made = quantize(row, self._source, windows, calibration, work)
        if made.weights is not None:
            task = self._task
            put_weights(task, made.weights)
        elif self.form == FULL:
            task = made.task
        else:
            raise ValueError(
                f"{row}: quantizes inputs or embeddings, which only the full measure judges"
            )
        began = time.perf_counter()
        values = self.judge.judge(task)
        return values, made.seconds | {"judging": time.perf_counter() - began}

    def _windows(self, calibration: Calibration) -> TokenWindows:
        return token_windows(self._preset, self._skeleton, calibration)


def _huggingface(folder: Path, num_blocks: int | None) -> Path:
    if not folder.exists():
        part = smollm2_directory(folder.with_suffix(".part"), dither=True, num_blocks=num_blocks)
        part.rename(folder)
    return folder


def _written(file: Path, documents: Any, cache: Path) -> Path:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text}) + "\n" for text in documents(cache / "packages")]
        part = file.with_suffix(".part")
        part.write_text("".join(lines), encoding="utf-8")
        part.rename(file)
    return file
