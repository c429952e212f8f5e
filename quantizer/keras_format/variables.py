"""Encode quantized weights as the variables that stock Keras stores, and decode them.

Names and shapes are those of the layers' `variable_serialization_spec`; what a mode lacks (int8's
zero points) or does not quantize (a bias) is not among the variables. Later layers are calibrated
on what a committed file holds, so decoding starts from that file's own arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from quantizer.errors import LayerError
from quantizer.keras_format.kernel_layout import KernelLayout
from quantizer.result import ChannelWeight, Float8Weight, Float32, GroupedWeight, QuantizedWeight
from quantizer.rtn import AMAX_HISTORY_LENGTH
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme

Variables = dict[str, NDArray[Any]]
_Byte = TypeVar("_Byte", np.int8, np.uint8)


def encode_kernel(weight: QuantizedWeight, layout: KernelLayout, scheme: Scheme) -> Variables:
    """The variables of a Dense or EinsumDense layer.

    Args:
        weight: from `quantizer.solve`, with `row_groups(layout, scheme, name)`.
    """
    match scheme, weight:
        case GPTQScheme() | AWQScheme(), GroupedWeight():
            codes = np.ascontiguousarray(weight.codes_RC)
            variables: Variables = {
                "quantized_kernel": (
                    pack_nibbles(codes, axis=0) if scheme.weight_bits == 4 else codes
                ),
                "kernel_scale": weight.scale_RG,
                "kernel_zero": weight.zero_RG,
            }
            if weight.input_scale_C is not None:
                variables["awq_scales"] = weight.input_scale_C
            return {**variables, "g_idx": weight.group_C.astype(np.float32)}
        case Int8Scheme(), ChannelWeight():
            return {
                "kernel": np.ascontiguousarray(layout.from_matrix(weight.codes_RC)),
                "kernel_scale": layout.to_output(weight.scale_R),
            }
        case Int4Scheme(), ChannelWeight():
            return {
                "kernel": pack_nibbles(weight.codes_RC.T, axis=-1),
                "kernel_scale": weight.scale_R,
            }
        case Int4Scheme(), GroupedWeight():
            return {
                "kernel": pack_nibbles(weight.codes_RC.T, axis=-1),
                "kernel_scale": np.ascontiguousarray(weight.scale_RG.T),
                "kernel_zero": np.ascontiguousarray(weight.zero_RG.T),
                "g_idx": weight.group_C.astype(np.float32),
            }
        case Float8Scheme(), Float8Weight():
            return {
                "kernel": np.ascontiguousarray(layout.from_matrix(weight.value_RC)),
                "inputs_scale": np.asarray(weight.input_scale),
                "inputs_amax_history": _amax_history(weight.input_amax),
                "kernel_scale": np.asarray(weight.weight_scale),
                "kernel_amax_history": _amax_history(weight.weight_amax),
                # Inference has no gradients; these are Keras' own initial values.
                "outputs_grad_scale": np.ones((), np.float32),
                "outputs_grad_amax_history": _amax_history(np.float32(0)),
            }
    raise TypeError(f"a {type(weight).__name__} is no result of {scheme!r}")


def _amax_history(amax: np.float32) -> Float32:
    # Newest first: if the model is trained on, Keras continues from the calibrated value.
    amax_H = np.zeros(AMAX_HISTORY_LENGTH, np.float32)
    amax_H[0] = amax
    return amax_H


def decode_kernel(
    variables: Mapping[str, NDArray[Any]], layout: KernelLayout, scheme: Scheme
) -> Float32:
    """The dequantized kernel, float32, shaped as Keras builds it.

    Args:
        variables: by name, from `encode_kernel` or a file.
    """
    return np.ascontiguousarray(_decoded(variables, layout, scheme, np))


def decode_on_device(
    variables: Mapping[str, NDArray[Any]], layout: KernelLayout, scheme: Scheme, dtype: str
) -> Array:
    """What `decode_kernel` gives, bit for bit, made on the device, and rounded to `dtype` there.

    But for a scale below float32's normal numbers, 1.2e-38, which counts as zero in all of XLA's
    programs: so do the numbers of such a group.
    """
    with jax.enable_x64(True):  # for quotients (see `_divided`)
        decoded: Array = _decode_program(variables, layout, scheme, dtype)
        return decoded


@partial(jax.jit, static_argnames=("layout", "scheme", "dtype"))
def _decode_program(
    variables: Mapping[str, NDArray[Any]], layout: KernelLayout, scheme: Scheme, dtype: str
) -> Array:
    decoded: Array = _decoded(variables, layout, scheme, jnp)
    return decoded.astype(dtype)


def _decoded(variables: Mapping[str, Any], layout: KernelLayout, scheme: Scheme, xp: Any) -> Any:
    """The dequantized kernel, of arrays of NumPy or of `jax.numpy`, whichever `xp` is.

    Both round alike: no operation can be fused with the next into one that rounds otherwise, as
    differences of codes are small integers.
    """
    match scheme:
        case GPTQScheme() | AWQScheme():
            num_columns = layout.in_features * layout.out_features // layout.keras_rows
            codes = variables["quantized_kernel"]
            if scheme.weight_bits == 4:
                codes = unpack_nibbles(codes, num_columns, axis=0, xp=xp)
            values = _decode_groups(codes, variables, axis=1, xp=xp)
            if isinstance(scheme, AWQScheme):
                values = _divided(values, _float32(variables["awq_scales"]), xp)
            return values.T.reshape(layout.shape)
        case Int8Scheme():
            scale_R = by_channel(variables["kernel_scale"], layout)
            matrix_RC = _float32(layout.to_matrix(variables["kernel"]))
            return layout.from_matrix(_divided(matrix_RC, scale_R[:, None], xp))
        case Int4Scheme():
            codes = unpack_nibbles(variables["kernel"], layout.out_features, axis=-1, xp=xp)
            if "g_idx" in variables:
                values = _decode_groups(codes, variables, axis=0, xp=xp)
            else:
                values = _divided(_float32(codes), _float32(variables["kernel_scale"]), xp)
            return values.reshape(layout.shape)
        case Float8Scheme():
            return _float32(variables["kernel"])


def _decode_groups(
    codes: Any, variables: Mapping[str, Any], axis: int, prefix: str = "kernel", xp: Any = np
) -> Any:
    """(code - zero) · scale, float32, with groups along `axis`."""
    group = variables["g_idx"].astype(np.int32)
    zero = xp.take(_float32(variables[f"{prefix}_zero"]), group, axis)
    scale = xp.take(_float32(variables[f"{prefix}_scale"]), group, axis)
    return (_float32(codes) - zero) * scale


def _divided(values: Any, divisor: Any, xp: Any) -> Any:
    """values / divisor of float32, rounded once."""
    if xp is np:
        return values / divisor
    # In float32 XLA multiplies by the reciprocal of what it broadcasts, and rounds twice, and GPUs
    # divide with errors in the last bit. In float64 neither shows: no quotient of two float32, of
    # 24 bits, comes closer than 2^-48 to where rounding to float32 changes, and errors are 2^-51.
    return (values.astype(np.float64) / divisor.astype(np.float64)).astype(np.float32)


def _float32(array: Any) -> Any:
    return array.astype(np.float32)


def by_channel(scale: Any, layout: KernelLayout) -> Any:
    """The inverse of `KernelLayout.to_output`, float32: one value per output channel."""
    as_output = scale.reshape([layout.shape[axis] for axis in layout.scale_axes])
    order = [layout.scale_axes.index(axis) for axis in layout.out_axes]
    return _float32(as_output.transpose(order).reshape(-1))


def embedding_scheme(scheme: Scheme, name: str) -> Int8Scheme | Int4Scheme:
    """The scheme, if stock Keras has embeddings quantized in it.

    Raises:
        LayerError: it has not; `name` is the layer.
    """
    if not isinstance(scheme, Int8Scheme | Int4Scheme):
        raise LayerError(
            f"{name}: stock Keras quantizes embeddings to int8 or int4 only, not "
            f"{scheme.mode}; exclude the layer, or give it Int8Scheme or Int4Scheme"
        )
    return scheme


def encode_embedding(
    table: QuantizedWeight, reverse: QuantizedWeight | None, scheme: Int8Scheme | Int4Scheme
) -> Variables:
    """The variables of an Embedding or ReversibleEmbedding.

    Args:
        table: of [tokens, vector]: each token's vector is an output channel.
        reverse: of the second table, [tokens, vector], by which an untied ReversibleEmbedding
            computes logits; None when tied or absent. Keras stores it transposed.
    """
    variables = _encode_table("embeddings", table, scheme, transposed=False)
    if reverse is not None:
        variables |= _encode_table("reverse_embeddings", reverse, scheme, transposed=True)
    return variables


def _encode_table(
    prefix: str, weight: QuantizedWeight, scheme: Int8Scheme | Int4Scheme, *, transposed: bool
) -> Variables:
    def stored(array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(array.T if transposed else array)

    assert isinstance(weight, ChannelWeight | GroupedWeight)
    codes = stored(weight.codes_RC)
    if isinstance(scheme, Int4Scheme):
        codes = pack_nibbles(codes, axis=0 if transposed else -1)
    if isinstance(weight, ChannelWeight):
        return {prefix: codes, f"{prefix}_scale": weight.scale_R}
    variables = {
        prefix: codes,
        f"{prefix}_scale": stored(weight.scale_RG),
        f"{prefix}_zero": stored(weight.zero_RG),
    }
    # Both tables share one map of vector entries to groups.
    return variables | ({} if transposed else {"g_idx": weight.group_C.astype(np.float32)})


def decode_embedding(
    variables: Mapping[str, NDArray[Any]],
    scheme: Int8Scheme | Int4Scheme,
    vector_length: int,
    *,
    reverse: bool = False,
) -> Float32:
    """A dequantized table, float32, shaped as Keras builds it.

    Args:
        variables: by name, from `encode_embedding` or a file.
        reverse: the second table, [vector, tokens]; else the first, [tokens, vector].
    """
    prefix, axis = ("reverse_embeddings", 0) if reverse else ("embeddings", 1)
    codes: NDArray[Any] = variables[prefix]
    if isinstance(scheme, Int4Scheme):
        codes = unpack_nibbles(codes, vector_length, axis)
    if f"{prefix}_zero" in variables:
        grouped: Float32 = _decode_groups(codes, variables, axis, prefix)
        return grouped
    scale = np.expand_dims(variables[f"{prefix}_scale"], axis)
    values: Float32 = _float32(codes) / _float32(scale)
    return values


def pack_nibbles(codes: NDArray[_Byte], axis: int) -> NDArray[_Byte]:
    """Pack 4-bit codes two to a byte, as stock Keras does; the axis halves, rounded up.

    The first of two neighbours along the axis goes to the low nibble; an odd length is padded
    with a zero code. int8 codes lie in [-8, 7] (int4), uint8 codes in [0, 15] (gptq, awq).
    """
    front = np.moveaxis(codes, axis, 0)
    if front.shape[0] % 2:
        front = np.concatenate([front, np.zeros_like(front[:1])])
    nibbles = np.ascontiguousarray(front).view(np.uint8) & 0x0F
    packed = nibbles[::2] | (nibbles[1::2] << 4)
    return np.ascontiguousarray(np.moveaxis(packed.view(codes.dtype), 0, axis))


def unpack_nibbles(packed: Any, length: int, axis: int, xp: Any = np) -> Any:
    """The inverse of `pack_nibbles`; `length` is the axis' unpacked length.

    Args:
        packed: an array of NumPy or of `jax.numpy`, whichever `xp` is.
    """
    front = xp.moveaxis(packed, axis, 0).view(np.uint8)
    nibbles = xp.stack([front & 0x0F, front >> 4], axis=1).reshape(-1, *front.shape[1:])[:length]
    if packed.dtype == np.int8:
        nibbles = (nibbles ^ 8).astype(np.int8) - np.int8(8)
    codes = xp.moveaxis(nibbles, 0, axis)
    return np.ascontiguousarray(codes) if xp is np else codes
