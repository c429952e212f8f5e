"""What layers do to their block's output is measured with them alone in the source's block."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.composition.composed_plan import read_given_run
from pipeline.composition.layer_errors import LayerErrors, measure_layers
from pipeline.run.records import file_key
from pipeline.worker.streamed_model import source_model
from quantizer import kernel_layout
from quantizer.keras_format.variables import decode_kernel
from tests.integration.quantized import FinishedRun, batch_of
from tests.pipeline.composition.test_sensitivities import GIVEN, TOKENS, fresh, runs_of
from tests.pipeline.tiny_runs import CountingExecutor, QuickWorker

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layer-errors")


def measured(
    runs: list[FinishedRun], tokens_per_pass: int, workers: int = 1
) -> tuple[tuple[LayerErrors, ...], ...]:
    first = runs[0]
    executor = CountingExecutor(
        lambda: QuickWorker(first.plan, str(first.source), str(first.folder)), workers
    )
    given = [read_given_run(run.store) for run in runs]
    return measure_layers(
        executor,
        [fresh()] * len(given),
        given,
        GIVEN,
        tokens_per_pass=tokens_per_pass,
        tell=lambda text: None,
    )


def kernels(run: FinishedRun, block: int) -> dict[str, tuple[str, Any]]:
    """By a layer's path, that of its kernel, and what stands there instead."""
    data = run.store.get(file_key(block + 1))
    solved, _ = run.model.committed(block + 1, data)
    targets = run.model.targets(block + 1)
    found = {}
    for layer in run.plan.parts[block + 1].layers:
        if layer.scheme is not None:
            target = targets[layer.path]
            kernel = decode_kernel(solved[layer.path], kernel_layout(target.layer), layer.scheme)
            found[layer.path] = target.kernel_path, kernel
    return found


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("Llama3", [{"query", "key", "value"}, {"attention_output"}, None, None]),
        ("Bert", [{"query", "key", "value"}, {"attention_output"}, None, None]),
    ],
)
def test_it_is_what_one_unit_alone_changes(
    architecture: str, expected: list[set[str] | None], folder: Path
) -> None:
    runs = runs_of(architecture, folder)
    found = measured(runs, 600)
    source = source_model(runs[0].model)
    states = source.embed([batch_of(source, TOKENS)])
    for call, of_block in zip(source.graph.calls, found, strict=True):
        number, [gives] = source.graph.calls.index(call), call.gives
        exact = [dict(states[0])]
        source.advance(number, exact)
        before = np.asarray(exact[0][gives], np.float64)
        for run, errors in zip(runs, of_block, strict=True):
            assert [unit.layers for unit in errors.units] == [x.layers for x in of_block[0].units]
            named = [{path.rpartition("/")[2] for path in unit.layers} for unit in errors.units]
            assert len(named) == len(expected)
            assert all(one is None or one in named for one in expected)
            file = run.store.get(file_key(call.block + 1))
            assert sum(x.stored_bytes for x in errors.units) < len(file)
            instead = kernels(run, call.block)
            for unit in errors.units:
                own = dict(instead[path] for path in unit.layers)
                changed = [
                    (v, own.get(str(v.path), value)) for v, value in source.block(call.block)
                ]
                given = [dict(states[0])]
                source.advance(number, given, changed)
                after = np.asarray(given[0][gives], np.float64)
                each = ((after - before) ** 2).sum(-1) / (before**2).sum(-1)
                assert unit.error == pytest.approx(each.mean(), rel=1e-3)
                assert unit.num_tokens == TOKENS.size
            assert errors.shares is not None
            assert sum(errors.shares) == pytest.approx(1)
        source.advance(number, states)


def test_workers_and_windows_in_parts_change_nothing(folder: Path) -> None:
    runs = runs_of("Llama3", folder)
    whole = measured(runs, 600)
    assert measured(runs, 600, workers=2) == whole
    parts = measured(runs, 100)  # a window each
    for one, other in zip(sum(parts, ()), sum(whole, ()), strict=True):
        assert dataclasses.replace(one, units=other.units) == other
        for a, b in zip(one.units, other.units, strict=True):
            assert dataclasses.replace(a, error=b.error) == b
            assert a.error is not None
            assert b.error is not None
            assert math.isclose(a.error, b.error, rel_tol=1e-4)
