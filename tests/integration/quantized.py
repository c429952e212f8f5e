"""Runs of small presets, finished in this process, and their output computed block by block."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.calibration.arrays import ExpectedInput
from pipeline.calibration.windows import TokenWindows
from pipeline.model.inputs import InputBatch, InputLayout
from pipeline.model.preset import read_preset
from pipeline.plan import Plan
from pipeline.planning.make_plan import make_plan
from pipeline.recipe.recipe import Calibration, Recipe, Rule
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.records import LayerRecord, PartRecord, record_key
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.model_state import ModelState
from pipeline.worker.streamed_model import StreamedModel
from pipeline.worker.worker import Worker
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme
from tests.pipeline.local_executor import LocalExecutor

GROUP_SIZE = 16
"""A head's width in the tiny presets, so that no group spans two of Gemma's heads."""

SCHEMES: dict[str, Scheme] = {
    # Searches do not change the format, so only one scheme has them, all at once.
    "gptq4": GPTQScheme(
        weight_bits=4, group_size=GROUP_SIZE, activation_order=True, refinement_sweeps=2
    ),
    **{
        f"gptq{bits}": GPTQScheme(weight_bits=bits, group_size=GROUP_SIZE, scale_search=False)
        for bits in (2, 3, 8)
    },
    "awq": AWQScheme(group_size=GROUP_SIZE, num_grid_points=4, clip_search=False),
    "int8": Int8Scheme(),
    "int4": Int4Scheme(block_size=GROUP_SIZE),
    "int4-channel": Int4Scheme(block_size=-1),
    "float8": Float8Scheme(),
}
"""Every format that an artifact can have."""


@cache
def _text() -> str:
    """The path of a text file: a page of Python's manual."""
    folder = Path(tempfile.mkdtemp(prefix="text-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "page.txt").write_text(topics["assignment"], encoding="utf-8")
    return str(folder / "page.txt")


def recipe(
    scheme: Scheme | None, *rules: Rule, embeddings: Scheme | None = None, name: str = "test"
) -> Recipe:
    """A recipe that calibrates, if its schemes need it, on ten short windows."""
    calibration = Calibration(texts=(_text(),), num_samples=10, sequence_length=32)
    return Recipe(
        name=name, scheme=scheme, rules=rules, embeddings=embeddings, calibration=calibration
    )


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run's plan, source preset and output folder."""

    plan: Plan
    source: Path
    folder: Path

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    @property
    def store(self) -> ObjectStore:
        return open_store(str(self.folder))

    @cached_property
    def model(self) -> ModelState:
        return ModelState(self.plan, str(self.source))

    def layers(self) -> dict[str, LayerRecord]:
        """The record of every layer, by path."""
        records = [
            PartRecord.from_json(self.store.get(record_key(part.part))) for part in self.plan.parts
        ]
        return {layer.path: layer for record in records for layer in record.layers}


def finished_run(source: Path, wanted: Recipe, folder: Path) -> FinishedRun:
    """Quantize a preset by a recipe, all in this process."""
    planned = make_plan(read_preset(str(source)), wanted, threads=1)
    store = open_store(str(folder))
    claim(store, planned.plan, planned.windows.to_bytes() if planned.windows else None)
    worker = Worker(planned.plan, str(source), str(folder))
    quantize(planned.plan, store, LocalExecutor([worker]), lambda step: None)
    return FinishedRun(plan=planned.plan, source=source, folder=folder)


def answer(
    model: StreamedModel, tokens: NDArray[np.int32], mask: NDArray[np.bool_] | None = None
) -> Any:
    """A streamed model's output for tokens [batch, sequence], by default without padding."""
    return answer_to(model, batch_of(model, tokens, mask))


def answer_to(model: StreamedModel, batch: InputBatch) -> Any:
    """A streamed model's output for a batch."""
    states = model.embed([batch])
    for call in range(len(model.graph.calls)):
        model.advance(call, states)
    return model.head()(states[0], batch)


def batch_of(
    model: StreamedModel, tokens: NDArray[np.int32], mask: NDArray[np.bool_] | None = None
) -> InputBatch:
    """The inputs of a model of one text, for tokens [batch, sequence]."""
    lengths = np.full(len(tokens), tokens.shape[1]) if mask is None else mask.sum(axis=1)
    windows = TokenWindows(
        tokens=np.asarray(tokens, np.int32),
        lengths=lengths.astype(np.int32),
        fingerprint="",
        num_documents=0,
    )
    tensors = (*model.graph.embed.inputs, *model.graph.head.inputs[len(model.graph.head_takes) :])
    names = {str(tensor.name): tensor for tensor in tensors}
    expected = {
        name: ExpectedInput(shape=tuple(tensor.shape[1:]), dtype=str(tensor.dtype))
        for name, tensor in names.items()
    }
    layout = InputLayout(inputs=expected)
    batch = layout.batch(windows, slice(None), len(tokens))
    assert mask is None or np.array_equal(batch.mask, mask)
    return batch


def distance(found: Any, expected: Any) -> float:
    """The largest absolute difference, relative to the largest expected value."""
    found, expected = (np.asarray(value, "float64") for value in (found, expected))
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())
