"""A process with stock KerasHub, and without quantfleet, that loads one preset after another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pipeline.artifact.stock_reader
from pipeline.calibration.windows import TokenWindows
from pipeline.model.inputs import InputBatch
from pipeline.worker.streamed_model import artifact_model
from quantizer.schemes import Float8Scheme, Int8Scheme
from tests.integration.quantized import FinishedRun, answer_to, distance

_LOOP = Path(__file__).with_name("stock_loop.py")
_READER = pipeline.artifact.stock_reader.__file__


@dataclass(frozen=True, kw_only=True)
class StockAnswer:
    """A preset's output (logits or embeddings), and its quantized layers' modes by path."""

    output: NDArray[np.float32]
    quantized: Mapping[str, str]


@dataclass(frozen=True)
class StockSession:
    process: subprocess.Popen[str]
    scratch: Path

    def ask(
        self,
        preset: Path,
        inputs: NDArray[np.int32] | Mapping[str, NDArray[Any]],
        *,
        eagerly: bool = False,
    ) -> None:
        """Start to load a preset and run it on token ids [batch, sequence], or arrays by name.

        See `answer`.

        Args:
            eagerly: as `model(inputs)` does, not compiled.
        """
        arrays = inputs if isinstance(inputs, Mapping) else {"": inputs}
        np.savez(self.scratch / "in.npz", **arrays)
        file = str(self.scratch / "in.npz")
        self._ask({"preset": str(preset), "inputs": file, "eagerly": eagerly})

    def ask_to_embed(self, preset: Path, texts: list[str], *, task: str | None = None) -> None:
        """Start to load a text embedder and run it on strings; see `answer`.

        Args:
            task: the class to load, if there is no task.json to name it.
        """
        self._ask({"preset": str(preset), "texts": texts, "task": task})

    def answer(self) -> StockAnswer:
        """Wait for the answer to the last request."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"stock KerasHub died: {(self.scratch / 'stderr.txt').read_text()[-2000:]}"
        reply = json.loads(line)
        assert "error" not in reply, reply["error"]
        output = np.load(self.scratch / "out.npy", allow_pickle=False)
        return StockAnswer(output=output, quantized=reply["quantized"])

    def _ask(self, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        job["outputs"] = str(self.scratch / "out.npy")
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()


@contextmanager
def stock_session(scratch: Path, backend: str = "jax") -> Iterator[StockSession]:
    """Run the process until the context exits.

    Args:
        scratch: a folder for the arrays that are exchanged.
        backend: Keras' backend, jax or torch.
    """
    with (
        (scratch / "stderr.txt").open("w") as stderr,
        subprocess.Popen(
            # -I ignores the current folder and PYTHONPATH, which lead to our packages.
            [sys.executable, "-I", str(_LOOP), str(_READER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "KERAS_BACKEND": backend},
            cwd=scratch,
            text=True,
        ) as process,
    ):
        yield StockSession(process, scratch)
        # On exit, Popen closes the standard input, which ends the process.


def some_tokens(run: FinishedRun) -> NDArray[np.int32]:
    vocabulary_size = run.model.skeleton.backbone.vocabulary_size
    return np.random.default_rng(7).integers(5, vocabulary_size, (2, 12), dtype="int32")


def batch_for(run: FinishedRun, tokens: NDArray[np.int32]) -> InputBatch:
    """What a run's model takes for tokens [batch, sequence] without padding, and no images."""
    layout = run.model.layout
    windows = TokenWindows(
        tokens=tokens,
        lengths=np.full(len(tokens), tokens.shape[1], np.int32),
        fingerprint="",
        num_documents=0,
        decoder_start=(0,) if layout.takes_two_texts else (),
    )
    return layout.batch(windows, slice(None), len(tokens))


def _rounds_inputs(run: FinishedRun) -> bool:
    """Whether stock Keras rounds what layers are given."""
    schemes = (layer.scheme for part in run.plan.parts for layer in part.layers)
    return any(isinstance(scheme, Int8Scheme | Float8Scheme) for scheme in schemes)


def assert_same(run: FinishedRun, *sessions: StockSession, tolerance: float = 1e-4) -> None:
    """Assert that stock Keras loads the planned modes and answers as the pipeline itself does."""
    batch = batch_for(run, some_tokens(run))
    for session in sessions:
        # Rounding what layers are given turns last bits, which compiling changes, into whole steps.
        session.ask(run.artifact, batch.arrays, eagerly=_rounds_inputs(run))
    expected = answer_to(artifact_model(run.model, run.store), batch)
    modes = {path: policy.partition("/")[0] for path, policy in run.plan.policies.items()}
    for found in [session.answer() for session in sessions]:
        # Policies name layers whose names Keras numbers by a pattern.
        names = {
            path: [name for name in modes if re.fullmatch(name, path)] for path in found.quantized
        }
        assert {name: found.quantized[path] for path, [name] in names.items()} == modes
        assert len(found.quantized) == len(modes)
        assert distance(found.output, expected) <= tolerance
