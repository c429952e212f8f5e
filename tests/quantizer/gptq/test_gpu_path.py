"""The way of GPUs, on a CPU: its kernels are interpreted, all else runs as it does there."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from quantizer import GPTQScheme, HessianSum, SolveResult, row_slices, solve, solve_stack
from quantizer.gptq import block_kernel, factor, gpu_loop
from quantizer.gptq import solve as gptq
from quantizer.gptq.bands import pack
from quantizer.gptq.path import CPU, GPU, Path, path_of
from quantizer.problem import LayerProblem
from quantizer.qparams import encode
from tests import reference
from tests.quantizer.gptq.test_column_loop import options_of, scheme
from tests.quantizer.problems import Problem, make

# A band of 2,048 rows, which small layers do not fill, takes long to interpret.
SMALL = dataclasses.replace(GPU, band=96)


@pytest.fixture(autouse=True)
def small_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels with shorter code, which compiles in a fifth of the time."""
    monkeypatch.setattr(block_kernel, "TILE", 2)
    monkeypatch.setattr(block_kernel, "STEP", 1)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "this_path", lambda: SMALL)


def solved(path: Path, given: Problem, options: GPTQScheme, monkeypatch) -> SolveResult:
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "this_path", lambda: path)
        return solve(given.weight_RC, given.hessian, options)


CASES = [
    (make(64, 150, 300), scheme(3, 64, False, True, True, sweeps=1)),
    pytest.param(
        make(64, 250, 400), scheme(3, 64, False, True, True, sweeps=2), marks=pytest.mark.exhaustive
    ),
    pytest.param(
        make(40, 64, 128, dead=7), scheme(2, -1, True, False, True), marks=pytest.mark.exhaustive
    ),
]


@pytest.mark.parametrize(
    ("given", "options"), CASES, ids=["two blocks", "two panels", "dead inputs"]
)
def test_codes_and_loss_are_those_of_cpus_and_of_the_paper(given, options, monkeypatch):
    cpu = solved(CPU, given, options, monkeypatch)
    # Panels of two blocks; a second one has a single block.
    for module in (factor, gpu_loop):
        monkeypatch.setattr(module, "PANEL", 160)
    gpu = solved(SMALL, given, options, monkeypatch)
    np.testing.assert_array_equal(gpu.weight.scale_RG, cpu.weight.scale_RG)
    assert np.mean(gpu.weight.codes_RC == cpu.weight.codes_RC) >= 0.999
    for field in ("weight_error", "output_error", "rtn_output_error"):
        assert getattr(gpu.report, field) == pytest.approx(getattr(cpu.report, field), rel=1e-4)
    assert (gpu.report.kept, gpu.report.rtn_rows) == (cpu.report.kept, cpu.report.rtn_rows)

    answer = reference.gptq(given.weight_RC, given.true_hessian, **options_of(options))
    assert np.mean(gpu.weight.codes_RC == answer.codes_RC) >= 0.999


@pytest.mark.exhaustive
def test_refitted_scales_are_those_of_cpus_and_of_the_reference(monkeypatch):
    given, options = make(64, 150, 300), scheme(3, 64, False, True, True, sweeps=1, refit=True)
    cpu = solved(CPU, given, options, monkeypatch)
    gpu = solved(SMALL, given, options, monkeypatch)
    # Least squares end in the rounding of float32, which depends on a product's shape.
    np.testing.assert_allclose(gpu.weight.scale_RG, cpu.weight.scale_RG, rtol=1e-5)
    assert np.mean(gpu.weight.codes_RC == cpu.weight.codes_RC) >= 0.999
    assert gpu.report.output_error == pytest.approx(cpu.report.output_error, rel=1e-4)
    answer = reference.gptq(given.weight_RC, given.true_hessian, **options_of(options))
    assert np.mean(gpu.weight.codes_RC == answer.codes_RC) >= 0.999
    error = reference.loss(given.weight_RC, gpu.weight.dequantize(), given.true_hessian)
    assert gpu.report.output_error == pytest.approx(error, rel=1e-3)


@pytest.mark.exhaustive
def test_tiles_as_large_as_on_gpus_give_the_same_codes(monkeypatch):
    given, options = make(96, 64, 128), scheme(3, 64, False, True, True, sweeps=1)
    small = solved(SMALL, given, options, monkeypatch)
    monkeypatch.undo()
    assert (block_kernel.TILE, block_kernel.STEP) == (16, 4)
    # In another height, so that the kernels are compiled anew.
    large = solved(dataclasses.replace(SMALL, band=128), given, options, monkeypatch)
    np.testing.assert_array_equal(small.weight.codes_RC, large.weight.codes_RC)
    assert large.report.output_error == pytest.approx(small.report.output_error, rel=1e-4)


def test_a_stack_equals_its_layers_solved_apart(on_gpu):
    given = make(160, 64, 128)
    options = scheme(4, 32, False, False, False, sweeps=1)
    # As a query and the smaller key and value: the last two share a band.
    weights = [given.weight_RC[a:b] for a, b in ((0, 96), (96, 128), (128, 160))]
    assert [len(row_slices(*weight_RC.shape)) for weight_RC in weights] == [1, 1, 1]
    together = solve_stack(weights, given.hessian, options)
    for weight_RC, one in zip(weights, together, strict=True):
        alone = solve(weight_RC, given.hessian, options)
        assert one.report == alone.report
        for field in ("codes_RC", "scale_RG", "zero_RG", "group_C"):
            np.testing.assert_array_equal(getattr(one.weight, field), getattr(alone.weight, field))


def test_bands_hold_every_slice_once_and_scales_of_one_dtype():
    heights, dtypes = [2048, 2048, 1024, 512, 1024, 512, 600], ["bfloat16"] * 4 + ["float32"] * 3
    slices = [
        LayerProblem(np.zeros((height, 8), np.float32), GPTQScheme(), dtype, None, "layer")
        for height, dtype in zip(heights, dtypes, strict=True)
    ]
    assert pack(slices, 2048) == [[0], [1], [2, 3], [4, 5], [6]]
    assert pack(slices, None) == [[number] for number in range(7)]


def test_workers_on_gpus_share_a_layer_by_its_bands(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert row_slices(4096, 14336) == [(0, 2048), (2048, 4096)]
    assert row_slices(1024, 4096) == [(0, 1024)]
    assert [b - a for a, b in row_slices(14336, 4096)] == [2048] * 7
    assert path_of("cpu") is CPU


def test_a_gram_that_no_damping_makes_definite_is_rounded_to_nearest(on_gpu):
    gram = np.eye(32, dtype=np.float32)
    gram[0, 1] = gram[1, 0] = 5.0
    weight = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    result = solve(weight, HessianSum(gram, 10), GPTQScheme(group_size=16))
    assert result.report.kept == "rtn"
    assert result.report.rtn_rows == 8
    scale, zero = (
        x[:, result.weight.group_C] for x in (result.weight.scale_RG, result.weight.zero_RG)
    )
    nearest = reference.nearest(weight.astype(np.float64), scale, zero, 15)
    np.testing.assert_array_equal(result.weight.codes_RC, nearest)


@pytest.mark.parametrize("max_code", [3.0, 255.0])
def test_kernels_round_as_grids_do(max_code):
    rng = np.random.default_rng(0)
    ties = np.arange(-300, 300) / 2
    below, above = np.nextafter(np.float32(0.5), 0), np.nextafter(np.float32(0.5), 1)
    ratio = np.concatenate(
        [ties, [below, -below, above, -above, 1e30, -1e30], 90 * rng.standard_normal(500)]
    )
    weight, zero = jnp.asarray(ratio, jnp.float32), jnp.float32(2)
    for scale in (jnp.float32(1), jnp.float32(0.37)):
        np.testing.assert_array_equal(
            block_kernel._nearest(weight, scale, zero, max_code),
            encode(weight, scale, zero, max_code),
        )
