"""Inspect a finished preset without trusting it, and run it with stock KerasHub.

An artifact may come from anywhere, and a manifest vouches only for its bytes; Keras's safe mode
stops code, but not decompression bombs. Stock KerasHub runs in a process that cannot import
quantfleet, which proves that a user needs nothing but the files.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.codes_file import read_codes_file
from pipeline.artifact.parts import Part, cut_parts, decode_part, weights_index
from pipeline.artifact.weights_file import read_weights_file
from pipeline.calibration.windows import TokenWindows
from pipeline.errors import ArtifactError
from pipeline.model.blocks import find_blocks
from pipeline.model.inputs import input_layout
from pipeline.model.preset import INDEX_FILE, TASK_WEIGHTS_FILE, read_preset
from pipeline.model.skeleton import build_skeleton, check_trusted
from quantizer.expert_codes import ExpertCodes

_TOKENS = 16


def inspect_artifact(
    folder: Path, codes: Callable[[int], bytes | None] = lambda _part: None
) -> None:
    """Check that a preset holds nothing but a KerasHub model.

    Its JSON may name only classes of Keras and KerasHub; its weights files must hold exactly the
    model's variables, and no more bytes than those take; and experts must be what their codes stand
    for.

    Args:
        codes: gives a part's file of codes, if it has one.

    Raises:
        PipelineError: names the file and what is wrong with it.
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
    known = {part.file for part in parts} | {TASK_WEIGHTS_FILE}
    for name in sorted(preset.sizes):
        if name.endswith((".h5", ".safetensors", ".bin", ".keras", ".pkl")) and name not in known:
            raise ArtifactError(
                f"{folder}/{name}: a weights file that does not belong to the model"
            )
    for part in parts:
        values = decode_part(part, (folder / part.file).read_bytes())
        beside = codes(part.number)
        if beside is not None:
            _check_codes(part, values, read_codes_file(beside))
    if TASK_WEIGHTS_FILE in preset.sizes:
        # At most the whole model in float32.
        most = sum(4 * math.prod(variable.shape) for variable in skeleton.model.variables)
        read_weights_file((folder / TASK_WEIGHTS_FILE).read_bytes(), max_bytes=most)


def _check_codes(
    part: Part, values: Mapping[str, NDArray[Any]], banks: Mapping[str, ExpertCodes]
) -> None:
    stored = {str(one.variable.path): values[one.name_path] for one in part.variables}
    for path, bank in sorted(banks.items()):
        if path not in stored or not np.array_equal(bank.kernel(stored[path].dtype), stored[path]):
            raise ArtifactError(
                f"{part.file}: the values of {path} are not what its codes stand for; they are of "
                "another run"
            )


def example_inputs(folder: Path) -> dict[str, NDArray[Any]]:
    """Arrays that a preset's model can be run on: a short text, and ones for all else it needs."""
    skeleton = build_skeleton(read_preset(str(folder)))
    layout = input_layout(skeleton)
    missing = [] if layout.encoders else layout.missing(())
    sizes = {name: [size or _TOKENS for size in layout.inputs[name].shape] for name in missing}
    windows = TokenWindows(
        tokens=np.arange(1, _TOKENS + 1, dtype=np.int32)[None],
        lengths=np.array([_TOKENS], np.int32),
        fingerprint="",
        num_documents=0,
        decoder_start=(0,) if layout.takes_two_texts else (),
        inputs={name: np.ones((1, *sizes[name]), layout.inputs[name].dtype) for name in missing},
    )
    return dict(layout.batch(windows, slice(None), 1).arrays)


_READER = Path(__file__).with_name("stock_reader.py")
_KERAS_READER = Path(__file__).with_name("stock_keras_reader.py")


@dataclass(frozen=True, kw_only=True)
class StockAnswer:
    """The outputs of stock KerasHub for some presets."""

    outputs: tuple[NDArray[np.float32], ...]
    """By preset: logits [batch, sequence, vocabulary], or embeddings [batch, vector] of a text
    embedder; where there are several outputs, all of their numbers."""
    backend: str
    keras_hub: str


def ask_stock(
    presets: Sequence[str | Path],
    inputs: Sequence[NDArray[np.int32] | Mapping[str, NDArray[Any]]],
    *,
    backend: str = "jax",
    timeout_seconds: float = 3600.0,
) -> StockAnswer:
    """Load presets with stock KerasHub in a new process, and run each on its inputs.

    Args:
        inputs: by preset: token ids [batch, sequence], or arrays for all inputs, by name.
        backend: of Keras: jax, torch or tensorflow.
        timeout_seconds: for all presets together.

    Raises:
        ArtifactError: stock KerasHub failed or took too long; the message ends with its output.
    """
    with tempfile.TemporaryDirectory(prefix="quantfleet-stock-") as scratch:
        jobs = []
        for index, (preset, given) in enumerate(zip(presets, inputs, strict=True)):
            files = {"inputs": f"{scratch}/in{index}.npz", "outputs": f"{scratch}/out{index}.npy"}
            if isinstance(given, Mapping):
                np.savez(files["inputs"], allow_pickle=False, **given)
            else:
                files["inputs"] = f"{scratch}/in{index}.npy"
                np.save(files["inputs"], np.ascontiguousarray(given, dtype=np.int32))
            jobs.append({"preset": str(Path(preset).resolve()), **files})
        names = ", ".join(job["preset"] for job in jobs)
        used = _ask(_READER, jobs, names, scratch, backend, timeout_seconds)
        outputs = tuple(np.load(job["outputs"], allow_pickle=False) for job in jobs)
    return StockAnswer(outputs=outputs, **used)


def ask_stock_keras(
    file: Path, *, backend: str = "jax", timeout_seconds: float = 3600.0
) -> dict[str, Any]:
    """Load a `.keras` file with stock Keras in a new process, and run it on zeros.

    Returns:
        The answer of `stock_keras_reader`: shapes, finite, backend, keras.

    Raises:
        ArtifactError: as `ask_stock`.
    """
    with tempfile.TemporaryDirectory(prefix="quantfleet-stock-") as scratch:
        request = {"model": str(file.resolve())}
        return _ask(_KERAS_READER, request, str(file), scratch, backend, timeout_seconds)


def _ask(
    reader: Path, request: Any, names: str, scratch: str, backend: str, timeout_seconds: float
) -> dict[str, Any]:
    """Run a script with a request on its standard input; returns its last line.

    Raises:
        ArtifactError: it failed or took too long; `names` is what it was to load.
    """
    try:
        # -I: neither the current folder nor PYTHONPATH makes our packages importable.
        done = subprocess.run(
            [sys.executable, "-I", str(reader)],
            input=json.dumps(request),
            env={**os.environ, "KERAS_BACKEND": backend},
            cwd=scratch,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ArtifactError(
            f"{names}: stock Keras did not finish in {timeout_seconds:.0f} s; raise the "
            "timeout, or load it by hand to see where it hangs"
        ) from None
    if done.returncode != 0:
        tail = " | ".join(line.strip() for line in done.stderr.strip().splitlines()[-12:])
        raise ArtifactError(
            f"{names}: stock Keras on {backend} failed (exit {done.returncode}): {tail}"
        )
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
