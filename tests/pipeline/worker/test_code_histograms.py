"""Counts of codes and scales beside NumPy's, of the committed files and of unpacked codes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.artifact.parts import decode_part
from pipeline.executor.protocol import Allocation
from pipeline.plan import LayerPlan
from pipeline.run.code_histograms import SCALE_OCTAVES, CodeHistogram
from pipeline.run.commits import committed_file
from pipeline.run.events import EventLog, read_events
from pipeline.run.solved_layers import SolvedLayer
from pipeline.storage.object_store import open_store
from pipeline.worker.code_histograms import code_histogram
from quantizer.expert_codes import ExpertCodes
from quantizer.keras_format.variables import encode_embedding, pack_nibbles
from quantizer.result import ChannelWeight, GroupedWeight
from quantizer.schemes import Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme
from tests.pipeline.tiny_runs import execute, model_state, planned


def spread(distances: np.ndarray) -> tuple[int, ...]:
    """A histogram of log2 about the median; what lies beyond its range is in the outer bins."""
    ratios = np.log2(distances.astype(np.float64) / np.median(distances))
    inside = np.clip(ratios, -SCALE_OCTAVES, SCALE_OCTAVES)
    counts, _ = np.histogram(inside, bins=24, range=(-SCALE_OCTAVES, SCALE_OCTAVES))
    return tuple(counts.tolist())


def planned_layer(scheme: Scheme, inputs: int, outputs: int, kind: str = "dense") -> LayerPlan:
    return LayerPlan(
        path="layer",
        name="layer",
        kind=kind,  # type: ignore[arg-type]
        in_features=inputs,
        out_features=outputs,
        scheme=scheme,
    )


@pytest.mark.parametrize(
    ("recipe", "codes_name", "lowest", "num_bins", "ends"),
    [
        # Another case: 4 bits are counted below, without a run.
        pytest.param("drift", "quantized_kernel", 0, 8, (0, 7), marks=pytest.mark.exhaustive),
        ("int8", "kernel", -128, 32, (-127, 127)),
    ],
)
def test_a_run_s_log_has_the_counts_of_its_committed_files(
    recipe: str, codes_name: str, lowest: int, num_bins: int, ends: tuple[int, int]
) -> None:
    given, store = planned(recipe), open_store(f"memory://histograms/{recipe}")
    log = EventLog(store, given.plan, Allocation(workers=1, threads=2))
    execute(given, store, report=log.also(lambda step: None))
    model = model_state(given.plan.to_json(), given.plan.source_url)
    told = {
        path: CodeHistogram.from_log(value)
        for event in read_events(store)
        for path, value in event.values.get("histograms", {}).items()
    }
    expected = {
        layer.path for part in given.plan.parts for layer in part.layers if layer.scheme is not None
    }
    assert set(told) == expected
    for part in given.plan.parts[1:]:
        cut = model.parts[part.part]
        values = decode_part(cut, committed_file(store, part.part))
        for layer in (one for one in part.layers if one.scheme is not None):
            stored = {
                one.name: values[one.name_path]
                for one in cut.variables
                if one.layer_path == layer.path
            }
            codes, scale = stored[codes_name].astype(int), stored["kernel_scale"]
            found = told[layer.path]
            assert found is not None
            assert (found.lowest, len(found.codes)) == (lowest, num_bins)
            counts, _ = np.histogram(
                codes, bins=num_bins, range=(lowest, lowest + num_bins * found.codes_per_bin)
            )
            assert found.codes == tuple(counts)
            assert found.ends == tuple(int((codes == end).sum()) for end in ends)
            distances = 1 / scale if recipe == "int8" else scale
            assert found.scale == pytest.approx(np.median(distances), rel=1e-3)
            assert found.scales == spread(distances)
    # Lines for people leave them out.
    assert all("histograms" not in event.line() for event in read_events(store))


def test_packed_codes_of_an_odd_number_are_counted_without_what_fills_up_the_last_byte() -> None:
    rng = np.random.default_rng(0)
    scheme = GPTQScheme(weight_bits=4, group_size=4)
    codes_RC = rng.integers(1, 16, (5, 8), np.uint8)
    scale_RG = rng.uniform(0.01, 1, (5, 2)).astype(np.float32)
    variables = {"quantized_kernel": pack_nibbles(codes_RC, axis=0), "kernel_scale": scale_RG}
    found = code_histogram(
        planned_layer(scheme, 8, 5), SolvedLayer(path="layer", variables=variables, report={})
    )
    assert found is not None
    assert found.codes == tuple(np.bincount(codes_RC.ravel(), minlength=16))
    assert found.codes[0] == 0
    assert found.scales == spread(scale_RG)


def test_both_tables_of_an_embedding_are_counted_with_the_distances_that_their_scales_make() -> (
    None
):
    rng = np.random.default_rng(1)
    scheme = Int4Scheme(block_size=-1)
    tables = [
        ChannelWeight(
            rng.integers(-8, 8, (7, 5), np.int8), rng.uniform(1, 99, 7).astype(np.float32)
        )
        for _ in range(2)
    ]
    found = code_histogram(
        planned_layer(scheme, 5, 7, "embedding"),
        SolvedLayer(path="layer", variables=encode_embedding(*tables, scheme), report={}),
    )
    codes = np.concatenate([table.codes_RC.ravel() for table in tables])
    distances = 1 / np.concatenate([table.scale_R for table in tables])
    assert found is not None
    assert (found.lowest, found.codes) == (-8, tuple(np.bincount(codes + 8, minlength=16)))
    assert found.ends == (int((codes == -8).sum()), int((codes == 7).sum()))
    assert found.scales == spread(distances)


def test_groups_with_a_zero_point_store_the_distance_itself() -> None:
    rng = np.random.default_rng(2)
    scheme = Int4Scheme(block_size=4)
    weight = GroupedWeight(
        rng.integers(-8, 8, (6, 8), np.int8),
        rng.uniform(0.01, 1, (6, 2)).astype(np.float32),
        np.zeros((6, 2), np.int8),
        np.repeat(np.arange(2, dtype=np.int32), 4),
    )
    found = code_histogram(
        planned_layer(scheme, 8, 6, "embedding"),
        SolvedLayer(path="layer", variables=encode_embedding(weight, None, scheme), report={}),
    )
    assert found is not None
    assert found.scales == spread(weight.scale_RG)
    assert found.codes == tuple(np.bincount(weight.codes_RC.ravel() + 8, minlength=16))


def test_experts_are_counted_all_together_and_float8_has_no_codes() -> None:
    rng = np.random.default_rng(3)
    bank = ExpertCodes(
        codes_ERC=rng.integers(0, 4, (3, 5, 8), np.uint8),
        scale_ERG=rng.uniform(0.01, 1, (3, 5, 2)).astype(np.float16),
        zero_ERG=np.full((3, 5, 2), 2, np.uint8),
        bits=2,
        group_size=4,
        symmetric=True,
    )
    solved = SolvedLayer(path="layer", variables={}, report={}, codes=bank)
    found = code_histogram(planned_layer(GPTQScheme(weight_bits=2), 8, 5), solved)
    assert found is not None
    assert found.codes == tuple(np.bincount(bank.codes_ERC.ravel(), minlength=4))
    assert found.scales == spread(bank.scale_ERG.astype(np.float32))
    kernel = SolvedLayer(path="layer", variables={"kernel": np.ones((2, 2))}, report={})
    assert code_histogram(planned_layer(Float8Scheme(), 2, 2), kernel) is None


def test_a_layer_takes_a_few_hundred_bytes_of_the_log() -> None:
    rng = np.random.default_rng(4)
    codes = rng.integers(-127, 128, 1 << 22).astype(np.int8).reshape(1 << 11, -1)
    variables = {"kernel": codes, "kernel_scale": np.exp(rng.normal(size=codes.shape[1]))}
    found = code_histogram(
        planned_layer(Int8Scheme(), *codes.shape),
        SolvedLayer(path="layer", variables=variables, report={}),
    )
    assert found is not None
    # Of 8 bits, which have most bins: 10,000 such layers are 5 MB.
    assert len(json.dumps(found.to_dict())) < 500
    assert found.num_weights == codes.size
    # Whoever reads the log gets what was told.
    again = CodeHistogram.from_log(json.loads(json.dumps(found.to_dict())))
    assert again is not None
    assert again.to_dict() == found.to_dict()


@pytest.mark.parametrize(
    "changed",
    [
        {"codes": [1] * 7},
        {"codes": [-1] * 8},
        {"codes": [True] * 8},
        {"codes": [0] * 8},
        {"codes": [1e300] * 8},
        {"ends": [9, 0]},
        {"ends": [1]},
        {"scales": [1] * 23},
        {"scales": None},
        {"scale": float("nan")},
        {"scale": "1"},
        {"scale": 10**400},
        {"lowest": -1000},
        {"lowest": "0"},
    ],
    ids=lambda one: str(one)[:30],
)
def test_what_is_no_histogram_is_not_read_as_one(changed: dict[str, object]) -> None:
    good = {"lowest": 0, "codes": [1] * 8, "ends": [1, 1], "scale": 0.5, "scales": [1] * 24}
    assert CodeHistogram.from_log(good) is not None
    assert CodeHistogram.from_log(good | changed) is None
    assert CodeHistogram.from_log([]) is None
