"""Folders of large shapes can be planned, though they hold no weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.costs import large_plan, with_experts

_8B = 8_030_261_248
"""Parameters of Llama 3 8B."""


@pytest.mark.exhaustive
def test_an_8b_model_is_planned_without_a_weight(tmp_path: Path) -> None:
    plan = large_plan("llama-3-8b", tmp_path)
    [weights] = tmp_path.rglob("*.safetensors")
    assert weights.stat().st_size > 2 * _8B
    assert 512 * weights.stat().st_blocks < 1 << 20
    assert sum(part.source_bytes for part in plan.parts) == 2 * _8B
    # Mixtral 8x7B has 46.7 billion parameters.
    mixed = with_experts(plan, 8, 32_000)
    assert sum(part.source_bytes for part in mixed.parts) == pytest.approx(2 * 46.7e9, rel=0.002)
    assert len(mixed.parts[1].groups) == 2 + 2 * 8
