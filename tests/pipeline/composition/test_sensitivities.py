"""What a block alone costs is what the model loses that is the source everywhere else."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.calibration.windows import TokenWindows
from pipeline.composition.composed_plan import read_given_run
from pipeline.composition.sensitivities import Sensitivity, measure_blocks
from pipeline.errors import PlanMismatchError
from pipeline.evaluation.batches import EvaluationSet
from pipeline.executor.protocol import ExecutorError
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.streamed_model import StreamedModel, artifact_model, source_model
from quantizer.schemes import Int4Scheme
from tests.integration.quantized import FinishedRun, batch_of, finished_run, recipe
from tests.pipeline.presets import shared_preset
from tests.pipeline.tiny_runs import CountingExecutor, QuickWorker

NUM_BLOCKS = 2
# Two batches, since one has at most 1,024 tokens; a tiny Bert has 256 positions.
TOKENS = np.random.default_rng(0).integers(5, 60, (5, 250)).astype(np.int32)
WINDOWS = TokenWindows(
    tokens=TOKENS, lengths=np.full(5, 250, np.int32), fingerprint="00" * 32, num_documents=1
)
GIVEN = EvaluationSet(windows=WINDOWS)
_stores = iter(range(1_000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sensitivities")


@functools.cache
def runs_of(architecture: str, folder: Path) -> list[FinishedRun]:
    source = shared_preset(architecture, num_blocks=NUM_BLOCKS)
    runs = []
    for size in (8, 32):
        path = folder / f"{architecture}-{size}"
        wanted = recipe(Int4Scheme(block_size=size), name=f"int4-{size}")
        runs.append(finished_run(source, wanted, path))
    return runs


def measured(
    runs: list[FinishedRun],
    store: ObjectStore,
    *,
    workers: int = 1,
    tokens_per_pass: int = 600,  # so that the two batches take turns
    **options: Any,
) -> tuple[tuple[tuple[Sensitivity, ...], ...], CountingExecutor]:
    first = runs[0]
    executor = CountingExecutor(
        lambda: QuickWorker(first.plan, str(first.source), str(first.folder)), workers, **options
    )
    given = [read_given_run(run.store) for run in runs]
    return measure_blocks(
        executor,
        [store] * len(given),
        given,
        GIVEN,
        tokens_per_pass=tokens_per_pass,
        tell=lambda text: None,
    ), executor


def fresh() -> ObjectStore:
    return open_store(f"memory://sensitivities/{next(_stores)}")


def output(source: StreamedModel, artifact: StreamedModel, block: int | None) -> Any:
    """Of a source with one block of an artifact, for all windows."""
    batch = batch_of(source, TOKENS)
    states = source.embed([batch])
    for number, call in enumerate(source.graph.calls):
        (artifact if call.block == block else source).advance(number, states)
    return np.asarray(source.head()(states[0], batch), np.float64)


def cost(before: Any, after: Any, *, predicts: bool) -> tuple[float, float]:
    """And its standard error."""
    if predicts:
        logs = []
        for logits in (before[:, :-1], after[:, :-1]):
            shifted = logits - logits.max(-1, keepdims=True)
            logs.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
        each = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    else:
        norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        each = 1 - (before * after).sum(-1) / norms
    means = each.mean(axis=1)
    return float(means.mean()), float(means.std(ddof=1) / len(means) ** 0.5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ["Llama3", "Bert"])
def test_it_is_the_loss_of_the_model_with_this_block_alone(architecture: str, folder: Path) -> None:
    runs = runs_of(architecture, folder)
    found, _ = measured(runs, fresh())
    predicts = architecture == "Llama3"
    source = source_model(runs[0].model)
    artifacts = [artifact_model(run.model, run.store) for run in runs]
    before = output(source, source, None)
    for block, of_block in enumerate(found):
        for artifact, sensitivity in zip(artifacts, of_block, strict=True):
            after = output(source, artifact, block)
            expected, error = cost(before, after, predicts=predicts)
            assert sensitivity.cost == pytest.approx(expected, rel=0.02, abs=2e-7)
            assert sensitivity.standard_error == pytest.approx(error, rel=0.1, abs=2e-7)
            assert sensitivity.num_windows == 5
            assert sensitivity.count == 5 * (249 if predicts else 250)
            assert sensitivity.figure == ("divergence" if predicts else "cosine")
    costs = [[one.cost for one in of_block] for of_block in found]
    # What an untrained encoder answers hardly depends on its text: there, chance decides.
    assert all(fine < coarse for fine, coarse in costs) or not predicts


@pytest.mark.exhaustive
def test_lost_workers_and_their_number_change_nothing(folder: Path) -> None:
    runs = runs_of("Llama3", folder)
    alone = fresh()
    found, _ = measured(runs, alone)
    store = fresh()
    again, executor = measured(runs, store, workers=2, lose=[("sensitivities", 2)])
    assert again == found
    # The block that was lost, and none that was kept.
    assert executor.calls["sensitivities"] == NUM_BLOCKS + 1
    keys = alone.list()
    assert {key: store.get(key) for key in store.list()} == {key: alone.get(key) for key in keys}
    assert len(keys) == 2 * NUM_BLOCKS
    with pytest.raises(ExecutorError, match="what is measured is kept"):
        measured(runs, fresh(), lose=[("sensitivities", number) for number in range(1, 99)])


@pytest.mark.exhaustive
def test_many_windows_are_measured_in_parts(folder: Path) -> None:
    """So that a worker holds the activations of few; a part is not measured twice."""
    runs = runs_of("Llama3", folder)
    whole, _ = measured(runs, fresh())
    lose = [("sensitivities", 4)]
    parts, executor = measured(runs, fresh(), workers=2, tokens_per_pass=200, lose=lose)
    # Two windows each, and the last; from the lost one on they come again.
    assert executor.calls["sensitivities"] == 3 * NUM_BLOCKS + 3
    for one, other in zip(sum(parts, ()), sum(whole, ()), strict=True):
        assert one.cost == pytest.approx(other.cost, rel=1e-3)
        assert one.standard_error == pytest.approx(other.standard_error, rel=1e-3)
        assert (one.num_windows, one.count) == (other.num_windows, other.count)


@pytest.mark.exhaustive
def test_only_blocks_of_a_run_that_is_new_are_measured(folder: Path) -> None:
    runs = runs_of("Llama3", folder)
    store = fresh()
    measured(runs[:1], store)
    asked: list[list[str]] = []

    class Watched(QuickWorker):
        def sensitivities(self, block: int, runs: Any, *rest: Any) -> Any:
            asked.append([one.url for one in runs])
            return super().sensitivities(block, runs, *rest)

    first = runs[0]
    executor = CountingExecutor(
        lambda: Watched(first.plan, str(first.source), str(first.folder)), 1
    )
    given = [read_given_run(run.store) for run in runs]
    measure_blocks(
        executor, [store] * 2, given, GIVEN, tokens_per_pass=1 << 15, tell=lambda text: None
    )
    assert asked == [[runs[1].store.root_url]] * NUM_BLOCKS


@pytest.mark.exhaustive
def test_a_run_that_another_has_replaced_is_not_measured_in_its_name(folder: Path) -> None:
    runs = runs_of("Llama3", folder)
    first, other = (read_given_run(run.store) for run in runs)
    replaced = dataclasses.replace(first, store=other.store)
    executor = CountingExecutor(
        lambda: QuickWorker(runs[0].plan, str(runs[0].source), str(runs[0].folder)), 1
    )
    store = fresh()
    with pytest.raises(PlanMismatchError, match="another run has taken its place"):
        measure_blocks(
            executor, [store], [replaced], GIVEN, tokens_per_pass=600, tell=lambda text: None
        )
    assert not store.list()
