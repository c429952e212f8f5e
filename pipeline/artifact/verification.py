"""Look a finished preset over before Keras reads it: Keras' safe mode stops code, but no bombs.

An artifact may have come from anywhere, and a manifest vouches only for its bytes.

Ask stock KerasHub, in a process that cannot import quantfleet, what a result answers.

The proof that a user needs nothing of ours: what comes back was computed by Keras and KerasHub
alone, from the files alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.parts import INDEX_FILE, cut_parts, decode_part, weights_index
from pipeline.artifact.weights_file import read_weights_file
from pipeline.errors import ArtifactError
from pipeline.model.blocks import find_blocks
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton, check_trusted

_TASK_WEIGHTS = "task.weights.h5"


def inspect_artifact(folder: Path) -> None:
    """Make sure that a preset holds nothing but a model of KerasHub's.

    Its JSON names Keras' and KerasHub's own classes alone; its weights files hold exactly the
    model's variables, and no more bytes than those take.

    Raises:
        PipelineError: something else, by file.
    """
    preset = read_preset(str(folder))
    for name, data in sorted(preset.json_files.items()):
        if name == INDEX_FILE:
            continue
        try:
            check_trusted(json.loads(data), f"{folder}/{name}")
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{folder}/{name}: {error}") from error
    skeleton = build_skeleton(preset)
    blocks = [block.layer for block in find_blocks(skeleton).blocks]
    parts = cut_parts(skeleton.stored, blocks)
    if preset.json_files.get(INDEX_FILE) != weights_index(parts):
        raise ArtifactError(f"{folder}/{INDEX_FILE}: not the index of this model's files")
    known = {part.file for part in parts} | {_TASK_WEIGHTS}
    for name in sorted(preset.sizes):
        if name.endswith((".h5", ".safetensors", ".bin", ".keras", ".pkl")) and name not in known:
            raise ArtifactError(f"{folder}/{name}: a weights file that the model does not have")
    for part in parts:
        decode_part(part, (folder / part.file).read_bytes())
    if _TASK_WEIGHTS in preset.sizes:
        # At most all of the model, in its widest dtype.
        most = sum(4 * math.prod(variable.shape) for variable in skeleton.model.variables)
        read_weights_file((folder / _TASK_WEIGHTS).read_bytes(), max_bytes=most)


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
