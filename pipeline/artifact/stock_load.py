"""Ask stock KerasHub, in a process that cannot import quantfleet, what a result answers.

The proof that a user needs nothing of ours: what comes back was computed by Keras and KerasHub
alone, from the files alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ArtifactError

_READER = Path(__file__).with_name("stock_reader.py")
_TAIL_LINES = 12


@dataclass(frozen=True, kw_only=True)
class StockAnswer:
    """What stock KerasHub made of some presets."""

    outputs: tuple[NDArray[np.float32], ...]
    """By preset: logits [batch, sequence, vocabulary], or embeddings [batch, vector] of a text
    embedder."""
    backend: str
    keras: str
    keras_hub: str


def ask_stock(
    presets: Sequence[str | Path],
    token_ids: Sequence[NDArray[np.int32]],
    *,
    backend: str = "jax",
    timeout_seconds: float = 3600.0,
) -> StockAnswer:
    """Load presets with stock KerasHub in one fresh process, and run each on token ids.

    Args:
        presets: local folders with config.json, task.json, model.weights.json and its files.
        token_ids: [batch, sequence], by preset.
        backend: of Keras: jax, torch or tensorflow.
        timeout_seconds: for all of them.

    Raises:
        ArtifactError: stock KerasHub failed or took too long; the message ends with its own.
    """
    with tempfile.TemporaryDirectory(prefix="quantfleet-stock-") as scratch:
        jobs = []
        for index, (preset, tokens) in enumerate(zip(presets, token_ids, strict=True)):
            inputs, outputs = Path(scratch, f"in{index}.npy"), Path(scratch, f"out{index}.npy")
            np.save(inputs, np.ascontiguousarray(tokens, dtype=np.int32))
            jobs.append(
                {
                    "preset": str(Path(preset).resolve()),
                    "inputs": str(inputs),
                    "outputs": str(outputs),
                }
            )
        versions = _run(jobs, backend, scratch, timeout_seconds)
        answers = tuple(np.load(job["outputs"], allow_pickle=False) for job in jobs)
    return StockAnswer(outputs=answers, **versions)


def _run(
    jobs: list[dict[str, str]], backend: str, scratch: str, timeout_seconds: float
) -> dict[str, str]:
    names = ", ".join(job["preset"] for job in jobs)
    try:
        # -I: neither the current folder nor PYTHONPATH leads to our packages.
        done = subprocess.run(
            [sys.executable, "-I", str(_READER)],
            input=json.dumps(jobs),
            env={**os.environ, "KERAS_BACKEND": backend},
            cwd=scratch,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ArtifactError(
            f"{names}: stock KerasHub did not finish in {timeout_seconds:.0f} s; allow more, or "
            "load the preset by hand to see where it hangs"
        ) from None
    if done.returncode != 0:
        tail = " | ".join(line.strip() for line in done.stderr.strip().splitlines()[-_TAIL_LINES:])
        raise ArtifactError(
            f"{names}: stock KerasHub on {backend} failed (exit {done.returncode}): {tail}"
        )
    versions: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return versions
