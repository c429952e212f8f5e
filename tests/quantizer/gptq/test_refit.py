"""Scales refitted to codes: they approach the best of all, and no loss ever rises."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from quantizer import GPTQScheme, HessianSum, SchemeError, solve
from quantizer.gptq.column_loop import Columns
from quantizer.gptq.refit import Refit, refit_scales, unit_size
from quantizer.keras_format.kernel_layout import KernelAxes, RowGroups
from tests import reference
from tests.quantizer.problems import make

GIVEN = make(24, 80, 200)
BEFORE = GPTQScheme(weight_bits=3, group_size=32, refinement_sweeps=1)
AFTER = dataclasses.replace(BEFORE, scale_refit=True)


def test_passes_approach_the_solution_of_the_whole_system():
    solved = solve(GIVEN.weight_RC, GIVEN.hessian, BEFORE).weight
    group_C = solved.group_C
    steps_RC = solved.codes_RC.astype(np.float64) - solved.zero_RG[:, group_C]
    columns = Columns(
        jnp.asarray(GIVEN.weight_RC.T),
        jnp.asarray(group_C),
        jnp.asarray(solved.scale_RG.T),
        jnp.asarray(solved.zero_RG.T.astype(np.float32)),
    )
    missing_CR = jnp.asarray((GIVEN.weight_RC - solved.dequantize()).T)
    shift = jnp.float32(0.0)
    change_R = jnp.zeros(24)
    gram = GIVEN.hessian
    refit = Refit(jnp.asarray(gram.gram_CC), jnp.float32(gram.num_rows), 32, "float32")
    for _ in range(30):
        scale_GR, missing_CR, change_R = refit_scales(
            columns, missing_CR, shift, change_R, 7.0, refit
        )
        columns = columns.with_scales(scale_GR)

    hessian_CC, weight_RC = GIVEN.true_hessian, GIVEN.weight_RC.astype(np.float64)
    before_R = reference.row_losses(GIVEN.weight_RC - solved.dequantize(), hessian_CC)
    reached_R = reference.row_losses(np.asarray(missing_CR).T, hessian_CC)
    for channel in range(24):
        one_group_CG = steps_RC[channel][:, None] * (group_C[:, None] == np.arange(3))
        system_GG = one_group_CG.T @ hessian_CC @ one_group_CG
        best_G = np.linalg.solve(system_GG, one_group_CG.T @ hessian_CC @ weight_RC[channel])
        missing_C = weight_RC[channel] - one_group_CG @ best_G
        assert reached_R[channel] == pytest.approx(missing_C @ hessian_CC @ missing_C, rel=1e-3)
    np.testing.assert_allclose(change_R, reached_R - before_R, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_scales_are_stored_ones_and_no_channel_loses(scale_dtype):
    plain = solve(GIVEN.weight_RC, GIVEN.hessian, BEFORE, scale_dtype=scale_dtype)
    fitted = solve(GIVEN.weight_RC, GIVEN.hessian, AFTER, scale_dtype=scale_dtype)
    scale_RG = fitted.weight.scale_RG
    np.testing.assert_array_equal(scale_RG, reference.stored(scale_RG, scale_dtype))
    assert (scale_RG != plain.weight.scale_RG).mean() > 0.5
    assert fitted.report.output_error < 0.97 * plain.report.output_error
    restored_RC = fitted.weight.dequantize()
    exact = reference.loss(GIVEN.weight_RC, restored_RC, GIVEN.true_hessian)
    assert fitted.report.output_error == pytest.approx(exact, rel=1e-3)


def test_groups_that_fill_no_panel_share_a_unit():
    assert [unit_size(size) for size in (32, 128, 96, 300, 512, 600)] == [
        512,
        512,
        480,
        300,
        512,
        600,
    ]


def test_a_refit_without_a_sweep_is_refused():
    with pytest.raises(SchemeError, match="refinement_sweeps"):
        GPTQScheme(scale_refit=True)


def layout(heads: int, inputs: int, outputs: int) -> RowGroups:
    """As Gemma's queries are stored: heads by inputs in rows, a head's outputs in columns."""
    return RowGroups(KernelAxes((heads, inputs, outputs), (1,), (0, 2)), heads * inputs)


@pytest.mark.parametrize(("group_size", "refitted"), [(16, True), (24, False)])
def test_scales_that_channels_share_are_told_and_stay(group_size, refitted):
    given = make(16, 32, 96)
    scheme = GPTQScheme(weight_bits=3, group_size=group_size, refinement_sweeps=1)
    rows = layout(2, 32, 8)

    def solved(scheme):
        return solve(given.weight_RC, HessianSum.of(given.inputs_NC), scheme, row_groups=rows)

    plain, fitted = solved(scheme), solved(dataclasses.replace(scheme, scale_refit=True))
    same = np.array_equal(plain.weight.scale_RG, fitted.weight.scale_RG)
    assert same is not refitted
    assert ("were not refitted" in fitted.report.reason) is not refitted
    restored_RC = rows.to_matrix(fitted.weight.dequantize())
    error = reference.loss(given.weight_RC, restored_RC, given.true_hessian)
    assert fitted.report.output_error == pytest.approx(error, rel=1e-3)
    assert fitted.report.output_error <= plain.report.output_error
