"""A process that has stock KerasHub and nothing of ours, asked for one preset after another."""

from __future__ import annotations

import json
import os
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
from pipeline.worker.evaluate import artifact_model
from tests.integration.quantized import FinishedRun, answer, distance

_LOOP = Path(__file__).with_name("stock_loop.py")
_READER = pipeline.artifact.stock_reader.__file__


@dataclass(frozen=True, kw_only=True)
class StockAnswer:
    """What a preset answered: logits or embeddings, and its quantized layers' modes by path."""

    output: NDArray[np.float32]
    quantized: Mapping[str, str]


@dataclass(frozen=True)
class StockSession:
    process: subprocess.Popen[str]
    scratch: Path

    def ask(self, preset: Path, tokens: NDArray[np.int32]) -> None:
        """Have it load a preset and run it on token ids [batch, sequence]; `answer` waits."""
        np.save(self.scratch / "in.npy", tokens)
        self._ask({"preset": str(preset), "inputs": str(self.scratch / "in.npy")})

    def ask_to_embed(self, preset: Path, texts: list[str], *, task: str | None = None) -> None:
        """Have it load a text embedder and give it strings.

        Args:
            task: the class to load it as, where there is no task.json to name one.
        """
        self._ask({"preset": str(preset), "texts": texts, "task": task})

    def answer(self) -> StockAnswer:
        """What it answers to what it was asked."""
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
    """Start the process, and stop it in the end.

    Args:
        scratch: a folder for what goes back and forth.
        backend: of Keras: jax or torch.
    """
    with (
        (scratch / "stderr.txt").open("w") as stderr,
        subprocess.Popen(
            # -I: neither the current folder nor PYTHONPATH leads to our packages.
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
        # Leaving closes its standard input, and it ends when nothing more can come.


def some_tokens(run: FinishedRun) -> NDArray[np.int32]:
    vocabulary_size = run.model.skeleton.backbone.vocabulary_size
    return np.random.default_rng(7).integers(5, vocabulary_size, (2, 12), dtype="int32")


def assert_same(run: FinishedRun, *sessions: StockSession, tolerance: float = 1e-4) -> None:
    """Stock loads what was planned, and answers what the pipeline's streamed forward does."""
    tokens = some_tokens(run)
    for session in sessions:
        session.ask(run.artifact, tokens)
    expected = answer(artifact_model(run.model, run.store), tokens)
    modes = {path: policy.partition("/")[0] for path, policy in run.plan.policies.items()}
    for found in [session.answer() for session in sessions]:
        assert found.quantized == modes
        assert distance(found.output, expected) <= tolerance
