"""One real layer, quantized in several ways, judged by one measure.

The measure is tr(Δ H Δᵀ), Δ = W - Ŵ and H = 2·xᵀx / rows without damping, in float64: the mean
squared error of the layer's outputs over what it really saw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantizer import GPTQScheme, HessianSum, Scheme, solve
from tests.benchmarks.column_loop import min_max_grid
from tests.benchmarks.keras_gptq import KerasGPTQ
from tests.benchmarks.minilm import RealLayer

Float32 = NDArray[np.float32]

DAMPING = 0.01
REFINEMENT_SWEEPS = 4


@dataclass(frozen=True)
class Comparison:
    """Output errors of one layer at one width, as shares of the output's own energy.

    Attributes:
        layer: its name.
        in_features, out_features, bits: what was quantized, and to what.
        rtn: round to nearest on the min-max grid.
        keras_default: Keras' GPTQ as it comes, inputs in order.
        keras_activation_order: Keras' GPTQ, the most active inputs first.
        ours: our GPTQ with scale search, activation order and refinement.
    """

    layer: str
    in_features: int
    out_features: int
    bits: int
    rtn: float
    keras_default: float
    keras_activation_order: float
    ours: float

    @property
    def keras(self) -> float:
        """Keras' GPTQ, in the better of its two orders."""
        return min(self.keras_default, self.keras_activation_order)

    @property
    def gain(self) -> float:
        """How many times lower our error is than Keras' better one."""
        return self.keras / self.ours


def output_loss(weight_RC: Float32, restored_RC: Float32, hessian: HessianSum) -> float:
    """tr(Δ H Δᵀ) in float64."""
    delta_RC = weight_RC.astype(np.float64) - restored_RC
    hessian_CC = hessian.gram_CC * (2.0 / hessian.num_rows)
    return float(np.sum((delta_RC @ hessian_CC.astype(np.float64)) * delta_RC))


def output_energy(layer: RealLayer) -> float:
    """tr(W H Wᵀ): what the loss is a share of."""
    return output_loss(layer.weight_RC, np.zeros_like(layer.weight_RC), layer.hessian)


def round_to_nearest(weight_RC: Float32, *, bits: int, group_size: int) -> Float32:
    """Each weight's nearest value on its group's min-max grid."""
    max_code = 2.0**bits - 1
    weight_GS = weight_RC.reshape(-1, group_size)
    scale_G1, zero_G1 = min_max_grid(weight_GS, max_code)
    codes_GS = np.clip(np.round(weight_GS / scale_G1) + zero_G1, 0, max_code)
    return ((codes_GS - zero_G1) * scale_G1).reshape(weight_RC.shape)


def scheme_error(layer: RealLayer, scheme: Scheme) -> float:
    """The error of one of our schemes, as a share of the output's energy."""
    restored_RC = solve(layer.weight_RC, layer.hessian, scheme, name=layer.name).weight.dequantize()
    return output_loss(layer.weight_RC, restored_RC, layer.hessian) / output_energy(layer)


def compare(
    layer: RealLayer, keras_gptq: KerasGPTQ, *, bits: int, group_size: int = 64
) -> Comparison:
    """Quantize one layer with round-to-nearest, Keras' GPTQ and ours, all on equal terms."""
    energy = output_energy(layer)
    hessian_CC = layer.hessian.gram_CC * np.float32(2 / layer.hessian.num_rows)
    rounded_RC = round_to_nearest(layer.weight_RC, bits=bits, group_size=group_size)
    keras_losses = []
    for activation_order in (False, True):
        restored_RC, _ = keras_gptq.solve(
            layer.weight_RC,
            hessian_CC,
            bits=bits,
            group_size=group_size,
            activation_order=activation_order,
            hessian_damping=DAMPING,
        )
        keras_losses.append(output_loss(layer.weight_RC, restored_RC, layer.hessian))
    scheme = GPTQScheme(
        weight_bits=bits,
        group_size=group_size,
        activation_order=True,
        scale_search=True,
        refinement_sweeps=REFINEMENT_SWEEPS,
        hessian_damping=DAMPING,
    )
    out_features, in_features = layer.weight_RC.shape
    return Comparison(
        layer.name,
        in_features,
        out_features,
        bits,
        rtn=output_loss(layer.weight_RC, rounded_RC, layer.hessian) / energy,
        keras_default=keras_losses[0] / energy,
        keras_activation_order=keras_losses[1] / energy,
        ours=scheme_error(layer, scheme),
    )
