"""On a real encoder's layers our GPTQ beats Keras' own, as released, and round-to-nearest.

The error is tr(Δ H Δᵀ) over what the layers really saw; `python -m tests.benchmarks.accuracy`
prints the same numbers as a table.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np
import pytest

from tests.benchmarks.comparison import Comparison, compare, output_loss, round_to_nearest
from tests.benchmarks.keras_gptq import KerasGPTQ
from tests.benchmarks.minilm import RealLayer, load_backbone, record_layers, weight_matrix

pytestmark = pytest.mark.exhaustive

GROUP_SIZE = 64

Comparisons = dict[int, list[Comparison]]


@pytest.fixture(scope="module")
def block() -> list[RealLayer]:
    return record_layers(blocks=1)


@pytest.fixture(scope="module")
def keras_gptq() -> Iterator[KerasGPTQ]:
    with KerasGPTQ("numpy") as process:
        yield process


def _comparisons(
    layers: list[RealLayer], widths: tuple[int, ...], keras_gptq: KerasGPTQ
) -> Comparisons:
    return {
        bits: [compare(layer, keras_gptq, bits=bits, group_size=GROUP_SIZE) for layer in layers]
        for bits in widths
    }


def _check_every_layer(comparisons: Comparisons) -> None:
    for each in (each for of_width in comparisons.values() for each in of_width):
        assert each.ours < each.keras_default, each
        assert each.ours < each.keras_activation_order, each
        assert each.ours <= each.rtn, each


def _median_gains(comparisons: list[Comparison]) -> tuple[float, float]:
    """Over Keras as it comes, and over the better of its two activation orders."""
    default = statistics.median(each.keras_default / each.ours for each in comparisons)
    return default, statistics.median(each.gain for each in comparisons)


def test_each_matrix_of_a_block_is_recorded_once(block: list[RealLayer]) -> None:
    assert [layer.weight_RC.shape for layer in block] == [
        *[(384, 384)] * 4,
        (1536, 384),
        (384, 1536),
    ]
    assert len({layer.hessian.num_rows for layer in block}) == 1
    assert block[0].hessian.num_rows > 5000


def test_weight_matrix_is_what_the_layer_multiplies_by() -> None:
    attention = load_backbone().transformer_layers[0]._self_attention_layer
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((1, 2, 384), dtype=np.float32)
    for layer, inputs in [
        (attention._query_dense, hidden),
        (attention._output_dense, hidden.reshape(1, 2, 12, 32)),
    ]:
        outputs = np.asarray(layer(inputs)).reshape(2, 384)
        expected = hidden[0] @ weight_matrix(layer).T + np.asarray(layer.bias.value).reshape(384)
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_rounding_stays_within_a_step(block: list[RealLayer]) -> None:
    weight_RC = block[0].weight_RC
    rounded_RC = round_to_nearest(weight_RC, bits=4, group_size=GROUP_SIZE)
    groups = weight_RC.reshape(-1, GROUP_SIZE)
    step = (groups.max(1) - groups.min(1)) / 15
    miss = np.abs(weight_RC - rounded_RC).reshape(groups.shape).max(1)
    # Half a step for the code, and at the range's ends half a step for the zero point.
    assert (miss <= step * 1.001).all()
    assert output_loss(weight_RC, weight_RC, block[0].hessian) == 0


@pytest.mark.parametrize("bits", [2, 4])
def test_one_block_beats_keras_and_rounding(
    block: list[RealLayer], keras_gptq: KerasGPTQ, bits: int
) -> None:
    comparisons = _comparisons(block, (bits,), keras_gptq)
    _check_every_layer(comparisons)
    # The first block gains least; all six are in the slow test.
    over_default, over_better_order = _median_gains(comparisons[bits])
    assert over_default >= 2.3
    assert over_better_order >= 2.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_blocks_beat_keras_and_rounding(keras_gptq: KerasGPTQ) -> None:
    comparisons = _comparisons(record_layers(), (2, 3, 4, 8), keras_gptq)
    assert all(len(of_width) == 36 for of_width in comparisons.values())
    _check_every_layer(comparisons)
    over_default, over_better_order = _median_gains(comparisons[4])
    assert over_default >= 3.0
    assert over_better_order >= 2.4
