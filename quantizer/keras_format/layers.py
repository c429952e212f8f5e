"""Quantize a Keras layer in place, as Keras itself would have left it.

Keras makes the variables and sets the dtype policy (`layer.quantize`); the values come from
`quantizer.solver`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantizer.errors import LayerError
from quantizer.gptq.drift import DriftSum
from quantizer.hessian import CalibrationStatistics
from quantizer.keras_format.kernel_layout import (
    KernelLayout,
    dense_layout,
    einsum_layout,
    row_groups,
)
from quantizer.keras_format.model_layers import WITH_KERNEL, WITH_TABLE, layer_name, walk
from quantizer.keras_format.stored_policies import Format, stored_formats
from quantizer.keras_format.variables import (
    Variables,
    embedding_scheme,
    encode_embedding,
    encode_kernel,
)
from quantizer.result import SolveReport
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme
from quantizer.solver import check_layer, solve


@dataclass(frozen=True, kw_only=True, slots=True)
class SolvedLayer:
    """All that makes a float layer a quantized one; see `install`."""

    scheme: Scheme
    variables: Variables
    report: SolveReport


def kernel_layout(layer: keras.layers.Layer) -> KernelLayout:
    """The layout of a built Dense or EinsumDense layer's kernel.

    Raises:
        LayerError: another type of layer, one not built, or an equation that stock Keras cannot
            quantize.
    """
    _check_layer(layer, WITH_KERNEL)
    shape = tuple(layer._kernel.shape)
    if type(layer) is keras.layers.Dense:
        return dense_layout(shape)
    try:
        return einsum_layout(layer.equation, shape)
    except LayerError as error:
        raise LayerError(f"{layer_name(layer)}: {error}") from None


def quantize_layer(
    layer: keras.layers.Layer,
    scheme: Scheme,
    statistics: CalibrationStatistics | None = None,
    *,
    drift: DriftSum | None = None,
) -> SolveReport:
    """Quantize a Keras layer in place: its policy and variables become those of the scheme.

    Args:
        layer: a built Dense, EinsumDense, Embedding or ReversibleEmbedding, in floating point.
        statistics: of the layer's inputs, flattened by `kernel_layout(layer).flatten_inputs`; see
            `quantizer.solve`.
        drift: for `GPTQScheme.drift_correction` above 0.

    Returns:
        The solver's report. The layer is untouched when an error is raised.

    Raises:
        LayerError: a layer that stock Keras cannot hold in this scheme.
        QuantizationError: bad weights, statistics or scheme; the message names the layer.
    """
    solved = solve_layer(layer, scheme, statistics, drift=drift)
    install(layer, solved)
    return solved.report


def solve_layer(
    layer: keras.layers.Layer,
    scheme: Scheme,
    statistics: CalibrationStatistics | None = None,
    *,
    drift: DriftSum | None = None,
) -> SolvedLayer:
    """Find a layer's quantized variables, and leave it as it is. As `quantize_layer`."""
    check_storable(layer, scheme)
    name, dtype = layer_name(layer), layer.variable_dtype
    if type(layer) in WITH_TABLE:
        table, reverse = layer._embeddings, getattr(layer, "reverse_embeddings", None)
        variables, report = solve_embedding(
            _float32(table),
            None if reverse is None else _float32(reverse),
            scheme,
            scale_dtype=dtype,
            name=name,
        )
    else:
        layout = kernel_layout(layer)
        result = solve(
            layout.to_matrix(_float32(layer._kernel)),
            statistics,
            scheme,
            drift=drift,
            scale_dtype=dtype,
            row_groups=row_groups(layout, scheme, name),
            name=name,
        )
        variables, report = encode_kernel(result.weight, layout, scheme), result.report
    return SolvedLayer(scheme=scheme, variables=variables, report=report)


def install(layer: keras.layers.Layer, solved: SolvedLayer) -> None:
    """Give a layer the quantized variables that `solve_layer` found for it."""
    scheme = solved.scheme
    policy = quantized_policy(layer, scheme)
    layer.quantize(scheme.mode, config=keras_config(scheme))
    if scheme.mode in ("gptq", "awq"):
        # As Keras' own calibration does last.
        del layer._kernel
        setattr(layer, f"is_{scheme.mode}_calibrated", True)
    for variable, value in solved.variables.items():
        getattr(layer, _attribute(variable)).assign(value)
    assert layer.dtype_policy == policy


def check_storable(layer: keras.layers.Layer, scheme: Scheme) -> None:
    """Check that stock Keras can hold this layer in this scheme.

    Raises:
        LayerError: it cannot; the message says why and what to do instead.
    """
    _check_layer(layer, WITH_KERNEL + WITH_TABLE)
    quantized_policy(layer, scheme)
    if type(layer) in WITH_TABLE:
        embedding_scheme(scheme, layer_name(layer))
    else:
        row_groups(kernel_layout(layer), scheme, layer_name(layer))


def layer_format(layer: keras.layers.Layer, scheme: Scheme) -> Format:
    """What Keras has to know of a float layer to make it one of a scheme."""
    return Format(
        policy=quantized_policy(layer, scheme),
        config=keras_config(scheme),
        # By a policy alone Keras quantizes the inputs, too.
        is_default=not isinstance(scheme, Int8Scheme) or scheme.quantize_activations,
    )


def check_weights(layer: keras.layers.Layer, scheme: Scheme) -> None:
    """Check, before the work, that a layer's matrices can be solved in a scheme.

    Raises:
        WeightError, SchemeError: as `quantizer.solve`.
    """
    if type(layer) in WITH_TABLE:
        reverse = getattr(layer, "reverse_embeddings", None)
        matrices = [layer._embeddings, *([] if reverse is None else [reverse])]
        matrices = [_float32(table) for table in matrices]
    else:
        matrices = [kernel_layout(layer).to_matrix(_float32(layer._kernel))]
    for matrix in matrices:
        check_layer(matrix, scheme, scale_dtype=layer.variable_dtype, name=layer_name(layer))


def solve_embedding(
    table: ArrayLike, reverse: ArrayLike | None, scheme: Scheme, *, scale_dtype: str, name: str
) -> tuple[Variables, SolveReport]:
    """The variables of an Embedding or ReversibleEmbedding, and the report of its first table.

    Args:
        table: [tokens, vector].
        reverse: [vector, tokens], of an untied ReversibleEmbedding.

    Raises:
        QuantizationError: a bad table, or a scheme that Keras has no embeddings in.
    """
    in_table = embedding_scheme(scheme, name)
    result = solve(table, None, scheme, scale_dtype=scale_dtype, name=name)
    back = None
    if reverse is not None:
        back = solve(np.asarray(reverse).T, None, scheme, scale_dtype=scale_dtype, name=name).weight
    return encode_embedding(result.weight, back, in_table), result.report


def save_model(model: keras.Model, path: str | Path) -> None:
    """Save a model with quantized layers as a `.keras` file that stock Keras loads.

    `model.save` alone leaves out the zero points of gptq and awq layers (see `complete_state`), and
    the formats of layers inside layers such as MultiHeadAttention.

    Raises:
        LayerError: layers that stock Keras would not load quantized; nothing is written.
    """
    quantized = {
        id(layer): layer
        for layer, _ in walk([model])
        if type(layer) in WITH_KERNEL + WITH_TABLE and layer.quantization_mode is not None
    }
    if quantized:
        stored = stored_formats(
            model, {key: _present_format(layer) for key, layer in quantized.items()}
        )
        for key, reason in stored.lost.items():
            raise LayerError(f"{layer_name(quantized[key])}: {reason}; leave it in float")
        stored.apply()
    incomplete = [
        layer for layer in quantized.values() if layer.quantization_mode in ("gptq", "awq")
    ]
    with complete_state(incomplete):
        model.save(path)


def _present_format(layer: keras.layers.Layer) -> Format:
    policy = layer._dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[layer.path]
    config = layer.quantization_config
    quantizes_inputs = config is None or getattr(layer, "inputs_quantizer", None) is not None
    return Format(
        policy=policy,
        config=config,
        is_default=quantizes_inputs or layer.quantization_mode != "int8",
    )


@contextmanager
def complete_state(
    layers: Sequence[keras.layers.Layer],
    stored: Callable[[str, keras.Variable], Any] = lambda _, variable: variable,
) -> Iterator[None]:
    """Make quantized layers save what Keras' loader reads, in its order.

    Keras 3.15.1's saver omits kernel_zero of gptq and awq, which its loader requires.

    Args:
        layers: built and quantized.
        stored: what goes into the store, from the layer's name for a variable and the variable.
    """

    def save_own_variables(layer: keras.layers.Layer, store: Any) -> None:
        for index, (name, variable) in enumerate(own_variables(layer).items()):
            store[str(index)] = stored(name, variable)

    for layer in layers:
        # Set on the instance, past Keras' tracking of attributes, and removed again below.
        object.__setattr__(layer, "save_own_variables", partial(save_own_variables, layer))
    try:
        yield
    finally:
        for layer in layers:
            object.__delattr__(layer, "save_own_variables")


def own_variables(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """A quantized layer's variables by name, in the order in which stock Keras loads them."""
    names = layer.variable_serialization_spec[layer.quantization_mode]
    found = {name: getattr(layer, _attribute(name), None) for name in names}
    # The loader, too, skips what a layer lacks: a bias, the zero points of channel-wise int4.
    return {name: variable for name, variable in found.items() if variable is not None}


def _attribute(variable: str) -> str:
    # The public attribute of these is a property that dequantizes.
    return f"_{variable}" if variable in ("kernel", "embeddings") else variable


def _check_layer(layer: keras.layers.Layer, types: Sequence[type]) -> None:
    name = layer_name(layer)
    # Keras refuses subclasses: they may use their weights in other ways.
    if type(layer) not in types:
        raise LayerError(
            f"{name}: stock Keras cannot load a {type(layer).__name__} quantized; it can "
            "Dense, EinsumDense, Embedding and ReversibleEmbedding themselves. Exclude the layer"
        )
    if not layer.built:
        raise LayerError(f"{name}: the layer has no weights yet; call it once, or build it")
    if layer.quantization_mode is not None:
        raise LayerError(
            f"{name}: already quantized ({layer.dtype_policy.name}); start from the float model"
        )
    if layer.lora_enabled:
        raise LayerError(f"{name}: LoRA is on; merge it into the kernel first")


def _float32(variable: keras.Variable) -> NDArray[np.float32]:
    # Through Keras: a bfloat16 tensor of PyTorch has no NumPy form of its own.
    return np.asarray(keras.ops.convert_to_numpy(variable.value), dtype=np.float32)


def keras_config(scheme: Scheme) -> keras.quantizers.QuantizationConfig:
    """The quantization config with which Keras makes a layer's variables in a scheme."""
    match scheme:
        case GPTQScheme():
            return keras.quantizers.GPTQConfig(
                dataset=None,
                tokenizer=None,
                weight_bits=scheme.weight_bits,
                group_size=scheme.group_size,
                symmetric=scheme.symmetric,
                activation_order=scheme.activation_order,
                hessian_damping=scheme.hessian_damping,
            )
        case AWQScheme():
            return keras.quantizers.AWQConfig(
                dataset=None,
                tokenizer=None,
                weight_bits=scheme.weight_bits,
                group_size=scheme.group_size,
                num_grid_points=scheme.num_grid_points,
            )
        case Int8Scheme():
            if scheme.quantize_activations:
                return keras.quantizers.Int8QuantizationConfig()
            return keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
        case Int4Scheme():
            return keras.quantizers.Int4QuantizationConfig(block_size=scheme.block_size)
        case Float8Scheme():
            return keras.quantizers.Float8QuantizationConfig()


def quantized_policy(layer: keras.layers.Layer, scheme: Scheme) -> keras.DTypePolicy:
    """The dtype policy that stock Keras stores for a float layer in a scheme.

    Raises:
        LayerError: Keras has no such policy.
    """
    try:
        return keras.dtype_policies.get(f"{scheme.policy}_from_{layer.dtype_policy.name}")
    except ValueError as error:
        raise LayerError(f"{layer_name(layer)}: {error}") from None
