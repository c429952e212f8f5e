"""Float64 references of the algorithms, from the papers: slow, plain, and free of JAX.

GPTQ is Algorithm 1 of arXiv 2210.17323 as printed: the inverse Hessian, its upper Cholesky
factor, and one column's scaled error spread over all later columns. The solver under test uses
another factorization, so agreement shows that the two forms are one algorithm. Nothing here
imports `quantizer`: every rule that it shares with the solver is written down a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """A reference solution.

    Attributes:
        codes_RC: whole numbers on the stored grid (for float8: the E4M3 value itself).
        restored_RC: the weights that the codes stand for.
        rtn_RC: the same for round-to-nearest without any search beyond the grid's own.
        rtn_rows: output channels for which round-to-nearest was kept.
    """

    codes_RC: Float64
    restored_RC: Float64
    rtn_RC: Float64
    rtn_rows: int = 0


def hessian_of(inputs_NC: NDArray[np.floating]) -> Float64:
    """H = 2 xᵀx / N."""
    rows = np.asarray(inputs_NC, np.float64)
    return 2.0 / len(rows) * (rows.T @ rows)


def row_losses(delta_RC: NDArray[np.floating], hessian_CC: Float64) -> Float64:
    """Δ H Δᵀ of each output channel."""
    delta = np.asarray(delta_RC, np.float64)
    return np.einsum("rc,rc->r", delta @ hessian_CC, delta)


def loss(
    weight_RC: NDArray[np.floating], restored_RC: NDArray[np.floating], hessian_CC: Float64
) -> float:
    """tr(Δ H Δᵀ)."""
    delta = np.asarray(weight_RC, np.float64) - np.asarray(restored_RC, np.float64)
    return float(row_losses(delta, hessian_CC).sum())


def relative_weight_error(
    weight_RC: NDArray[np.floating], restored_RC: NDArray[np.floating]
) -> float:
    """‖W - Ŵ‖ / ‖W‖."""
    weight = np.asarray(weight_RC, np.float64)
    return float(
        np.linalg.norm(weight - np.asarray(restored_RC, np.float64)) / np.linalg.norm(weight)
    )


def stored(value: Float64, scale_dtype: str) -> Float64:
    """A value as it reads back from storage."""
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    # Scales are computed in float32 first: rounding twice is part of the format.
    return np.asarray(value, np.float32).astype(kinds[scale_dtype]).astype(np.float64)


def groups_of(in_features: int, group_size: int) -> list[slice]:
    """Runs of inputs that share a scale; the last may be short."""
    size = in_features if group_size == -1 else group_size
    return [slice(a, min(a + size, in_features)) for a in range(0, in_features, size)]


def grid(
    weight_RC: Float64,
    energy_C: Float64,
    *,
    weight_bits: int,
    group_size: int,
    symmetric: bool,
    search: bool,
    scale_dtype: str = "float32",
) -> tuple[Float64, Float64]:
    """Scale and zero point of every weight, [out_features, in_features] each.

    The range includes 0; the search shrinks it to 1.00, 0.96 … 0.20 of itself, then tries the
    best one's neighbours at ±0.01 and ±0.02, by Σ energy · error².
    """
    top = 2**weight_bits - 1
    scale_RC, zero_RC = np.empty_like(weight_RC), np.empty_like(weight_RC)
    for group in groups_of(weight_RC.shape[1], group_size):
        part, energy = weight_RC[:, group], energy_C[group]
        low = np.minimum(part.min(1, keepdims=True), 0)
        high = np.maximum(part.max(1, keepdims=True), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        full = (high - low) / top
        step = np.where(full > 0, full, 1.0)
        zero = np.clip(np.round(-low / step), 0, top)
        if symmetric:
            zero = np.full_like(zero, 2 ** (weight_bits - 1))

        def scale_at(shrink: Float64, full: Float64 = full) -> Float64:
            scale = stored(full * shrink, scale_dtype)
            # Float16 would round small scales to 0.
            scale = np.where(scale > 0, scale, 2.0**-24)
            return np.where(full > 0, scale, 1.0)

        def cost(
            shrink: Float64,
            part: Float64 = part,
            energy: Float64 = energy,
            zero: Float64 = zero,
        ) -> Float64:
            scale = scale_at(shrink)
            code = nearest(part, scale, zero, top)
            return (((code - zero) * scale - part) ** 2 @ energy)[:, None]

        best = np.ones_like(full)
        if search:
            lowest = cost(best)

            def consider(
                shrink: Float64, best: Float64, lowest: Float64
            ) -> tuple[Float64, Float64]:
                tried = cost(shrink)
                return np.where(tried < lowest, shrink, best), np.minimum(tried, lowest)

            for i in range(1, 21):
                best, lowest = consider(np.full_like(best, 1 - 0.04 * i), best, lowest)
            centre = best
            for offset in (-0.02, -0.01, 0.01, 0.02):
                best, lowest = consider(centre + offset, best, lowest)
        scale_RC[:, group], zero_RC[:, group] = scale_at(best), zero
    return scale_RC, zero_RC


def nearest(weight: Float64, scale: Float64, zero: Float64, top: int) -> Float64:
    """The nearest code on a grid, ties to even."""
    return np.clip(np.round(weight / scale) + zero, 0, top)


def inverse_factor(hessian_CC: Float64) -> Float64:
    """U upper triangular with H⁻¹ = Uᵀ U, by inverting H and factoring the inverse."""
    inverse = np.linalg.inv(hessian_CC)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T


def damped(hessian_CC: Float64, damping: float) -> Float64:
    """H plus a share of its live diagonal's mean; a dead input stands alone."""
    diagonal = np.diagonal(hessian_CC)
    dead = diagonal == 0
    mean = diagonal[~dead].mean()
    return hessian_CC + np.diag(np.where(dead, 1.0, 0.0) + damping * mean)


def gptq(
    weight_RC: NDArray[np.floating],
    hessian_CC: Float64,
    *,
    weight_bits: int,
    group_size: int,
    symmetric: bool,
    activation_order: bool,
    hessian_damping: float,
    scale_search: bool,
    refinement_sweeps: int = 0,
    scale_refit: bool = False,
    scale_dtype: str = "float32",
) -> Answer:
    """Algorithm 1 with static groups, then round-to-nearest wherever that had the lower loss.

    The columns of dead inputs, which the paper's program sets to zero, are rounded to nearest:
    nothing in the algorithm couples them to others.

    Refinement is QuantEase's coordinate descent on the damped loss, kept where the undamped fell;
    before each of its sweeps scales are refitted if asked for.
    """
    weight = np.asarray(weight_RC, np.float64)
    energy = np.diagonal(hessian_CC).copy()
    top = 2**weight_bits - 1
    dead = energy == 0
    order = np.argsort(-energy, kind="stable") if activation_order else np.arange(len(energy))
    factor = inverse_factor(damped(hessian_CC, hessian_damping)[np.ix_(order, order)])
    # Algorithm 1 pays 1 / factor_jj² for a squared error at column j.
    cost = np.empty_like(energy)
    cost[order] = 1 / np.diagonal(factor) ** 2
    # A dead input is taken for an average one.
    cost[dead] = cost[~dead].mean()
    scale, zero = grid(
        weight,
        cost,
        weight_bits=weight_bits,
        group_size=group_size,
        symmetric=symmetric,
        search=scale_search,
        scale_dtype=scale_dtype,
    )

    moved = weight[:, order].copy()
    codes = np.empty_like(moved)
    for j, source in enumerate(order):
        codes[:, j] = nearest(moved[:, j], scale[:, source], zero[:, source], top)
        restored = (codes[:, j] - zero[:, source]) * scale[:, source]
        error = (moved[:, j] - restored) / factor[j, j]
        moved[:, j:] -= np.outer(error, factor[j, j:])
    solved = np.empty_like(codes)
    solved[:, order] = codes

    rounded = nearest(weight, scale, zero, top)
    restored_RC, rtn_RC = (solved - zero) * scale, (rounded - zero) * scale
    rtn_loss = row_losses(weight - rtn_RC, hessian_CC)
    rtn_better = rtn_loss < row_losses(weight - restored_RC, hessian_CC)
    solved[rtn_better] = rounded[rtn_better]
    if refinement_sweeps:
        ridge = damped(hessian_CC, hessian_damping)
        # Alone in its row, a dead input may have any curvature in a sweep; a scale it shares with
        # others must not follow it.
        ridge[dead, dead] = hessian_damping * energy[~dead].mean()
        refined, fitted = solved.copy(), scale
        for _ in range(refinement_sweeps):
            if scale_refit:
                groups = groups_of(len(energy), group_size)
                steps = refined - zero
                fitted = refitted(weight, steps, fitted, ridge, hessian_CC, groups, scale_dtype)
            for j in range(len(energy)):
                values = (refined - zero) * fitted
                correction = (weight - values) @ ridge[:, j] / ridge[j, j]
                refined[:, j] = nearest(values[:, j] + correction, fitted[:, j], zero[:, j], top)
        before = row_losses(weight - (solved - zero) * scale, hessian_CC)
        after = row_losses(weight - (refined - zero) * fitted, hessian_CC)
        better = (after < before)[:, None]
        solved, scale = np.where(better, refined, solved), np.where(better, fitted, scale)
        rtn_better &= after >= before
    return Answer(solved, (solved - zero) * scale, rtn_RC, int(rtn_better.sum()))


def refitted(
    weight_RC: Float64,
    steps_RC: Float64,
    scale_RC: Float64,
    ridge_CC: Float64,
    hessian_CC: Float64,
    groups: list[slice],
    scale_dtype: str = "float32",
) -> Float64:
    """Each group's best scale in turn, by the damped loss, kept where both losses fall.

    Args:
        steps_RC: code - zero.
        scale_RC: of every weight.
        ridge_CC: the damped Hessian.
    """
    scale = scale_RC.copy()
    for group in groups:
        direction = np.zeros_like(weight_RC)
        direction[:, group] = steps_RC[:, group]
        delta = weight_RC - steps_RC * scale
        slope = np.einsum("rc,rc->r", delta @ ridge_CC, direction)
        curvature = row_losses(direction, ridge_CC)
        old = scale[:, group][:, 0]
        best = stored(old + slope / np.where(curvature > 0, curvature, 1), scale_dtype)
        moved = delta - direction * (best - old)[:, None]
        better = (best > 0) & (curvature > 0)
        for loss_CC in (ridge_CC, hessian_CC):
            better &= row_losses(moved, loss_CC) < row_losses(delta, loss_CC)
        scale[:, group] = np.where(better, best, old)[:, None]
    return scale


def awq(
    weight_RC: NDArray[np.floating],
    magnitude_C: Float64,
    hessian_CC: Float64,
    *,
    group_size: int,
    num_grid_points: int,
    clip_search: bool,
    scale_dtype: str = "float32",
) -> Answer:
    """Eq. 4-5 of arXiv 2306.00978: the exponent of the input scales with the least error.

    A diagonal `hessian_CC` judges by uncorrelated inputs.
    """
    [answer] = awq_together(
        [weight_RC],
        magnitude_C,
        hessian_CC,
        group_size=group_size,
        num_grid_points=num_grid_points,
        clip_search=clip_search,
        scale_dtype=scale_dtype,
    )
    return answer


def awq_together(
    weights_RC: Sequence[NDArray[np.floating]],
    magnitude_C: Float64,
    hessian_CC: Float64,
    *,
    group_size: int,
    num_grid_points: int,
    clip_search: bool,
    scale_dtype: str = "float32",
) -> list[Answer]:
    """The same for several layers of one input: one exponent, by the sum of their errors."""
    weights = [np.asarray(weight_RC, np.float64) for weight_RC in weights_RC]
    energy = np.diagonal(hessian_CC).copy()
    # Inputs never seen are taken for average ones.
    unseen = magnitude_C < 1e-8
    magnitude_C = np.where(unseen, np.exp(np.log(magnitude_C[~unseen]).mean()), magnitude_C)
    searched = np.where(energy == 0, energy[energy > 0].mean(), energy)

    def attempt(ratio: float, search: bool) -> tuple[float, list[tuple[Float64, Float64]]]:
        scales_C = np.maximum(magnitude_C**ratio, 1e-4)
        scales_C = stored(scales_C / np.sqrt(scales_C.max() * scales_C.min()), scale_dtype)
        total, found = 0.0, []
        for weight in weights:
            scaled = weight * scales_C
            scale, zero = grid(
                scaled,
                searched / scales_C**2,
                weight_bits=4,
                group_size=group_size,
                symmetric=False,
                search=search,
                scale_dtype=scale_dtype,
            )
            codes = nearest(scaled, scale, zero, 15)
            restored = (codes - zero) * scale / scales_C
            total += loss(weight, restored, hessian_CC)
            found.append((codes, restored))
        return total, found

    rounded = best = attempt(0.0, search=False)
    for step in range(num_grid_points + 1):
        candidate = attempt(step / num_grid_points, clip_search)
        if candidate[0] < best[0]:
            best = candidate
    pairs = zip(best[1], rounded[1], strict=True)
    return [Answer(codes, restored, rtn[1]) for (codes, restored), rtn in pairs]


def int_channels(weight_RC: NDArray[np.floating], *, low: int, high: int) -> Answer:
    """Keras' absolute-maximum rounding, one scale per output channel."""
    weight = np.asarray(weight_RC, np.float64)
    scale = stored(high / (np.abs(weight).max(1, keepdims=True) + 1e-7), "float32")
    codes = np.clip(np.round(weight * scale), low, high)
    return Answer(codes, codes / scale, codes / scale)


def int4_groups(weight_RC: NDArray[np.floating], *, block_size: int) -> Answer:
    """4-bit codes from -8 to 7 with a scale and a zero point per group; 0 lies in the range."""
    weight = np.asarray(weight_RC, np.float64)
    codes, restored = np.empty_like(weight), np.empty_like(weight)
    for group in groups_of(weight.shape[1], block_size):
        part = weight[:, group]
        low = np.minimum(part.min(1, keepdims=True), 0)
        high = np.maximum(part.max(1, keepdims=True), 0)
        scale = stored((high - low + 1e-7) / 15, "float32")
        zero = np.clip(np.round(-low / scale) - 8, -8, 7)
        codes[:, group] = np.clip(np.round(part / scale) + zero, -8, 7)
        restored[:, group] = (codes[:, group] - zero) * scale
    return Answer(codes, restored, restored)


def e4m3(value: NDArray[np.floating]) -> Float64:
    """Nearest E4M3 number (ties to even), saturating at 448: 3 bits of mantissa, 2⁻⁶ the least
    normal exponent."""
    value = np.asarray(value, np.float64)
    exponent = np.floor(np.log2(np.maximum(np.abs(value), 2.0**-20)))
    step = 2.0 ** (np.maximum(exponent, -6) - 3)
    return np.clip(np.round(value / step) * step, -448, 448)


def float8(weight_RC: NDArray[np.floating], *, power_of_two: bool) -> Answer:
    """The weight on E4M3's grid, its largest value at 448."""
    weight = np.asarray(weight_RC, np.float64)
    scale = float(stored(np.abs(weight).max() / 448, "float32"))
    if power_of_two:
        scale = 2.0 ** np.ceil(np.log2(scale))
    codes = e4m3(weight / scale)
    return Answer(codes, codes * scale, codes * scale)


def drift_target(
    weight_RC: NDArray[np.floating],
    inputs_NC: NDArray[np.floating],
    quantized_inputs_NC: NDArray[np.floating],
    *,
    strength: float,
    hessian_damping: float,
) -> Float64:
    """W' = W + α · argmin_S ‖(x - x̃) Wᵀ - x̃ Sᵀ‖² + damping ‖S‖², as stacked least squares."""
    weight = np.asarray(weight_RC, np.float64)
    exact, seen = np.asarray(inputs_NC, np.float64), np.asarray(quantized_inputs_NC, np.float64)
    energy = np.square(seen).sum(0)
    ridge = np.sqrt(hessian_damping * energy[energy > 0].mean())
    left = np.concatenate([seen, ridge * np.eye(seen.shape[1])])
    right = np.concatenate([(exact - seen) @ weight.T, np.zeros_like(weight.T)])
    shift_CR = np.linalg.lstsq(left, right, rcond=None)[0]
    return weight + strength * shift_CR.T
