"""Folders of large shapes can be planned, though they hold no weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.plan import Plan
from pipeline.planning.estimates import estimate
from tests.benchmarks.costs import large_plan

# KerasHub does not close it.
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*tokenizer\.model:ResourceWarning")
_PARAMETERS = {"llama-3-8b": 8_030_261_248, "mixtral-8x7b": 46_702_792_704}
"""As published: models that hold nothing but what is planned here."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", _PARAMETERS)
def test_a_large_model_is_planned_without_a_weight(name: str, tmp_path: Path) -> None:
    plan = large_plan(name, tmp_path)
    [weights] = tmp_path.rglob("*.safetensors")
    assert weights.stat().st_size > 2 * _PARAMETERS[name]
    assert 512 * weights.stat().st_blocks < 1 << 20
    assert source_bytes(plan) == 2 * _PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "active"),
    # Published are 3.3 and 22 billion, with heads, which no plan counts.
    [("qwen3-30b-a3b", 30.5e9, 3.3e9 - 0.3e9), ("qwen3-235b-a22b", 235e9, 22e9 - 0.6e9)],
)
def test_active_weights_are_those_in_the_models_names(
    name: str, weights: float, active: float, tmp_path: Path
) -> None:
    plan = large_plan(name, tmp_path)
    assert source_bytes(plan) == pytest.approx(2 * weights, rel=0.005)
    assert estimate(plan, 1).active_weights == pytest.approx(active, rel=0.05)


def source_bytes(plan: Plan) -> int:
    return sum(part.source_bytes for part in plan.parts)
