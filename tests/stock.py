"""Read a quantized stock Keras layer, and run it, in plain NumPy.

Written from Keras' definition of each mode and not from the quantizer's code, so that the two check
each other.
"""

import json

import keras
import ml_dtypes
import numpy as np
import safetensors.numpy

KERNEL_FORMS = {
    "dense": (None, (2, 5, 48), 40),
    "llama query": ("bqm,muh->bquh", (2, 5, 48), (None, 4, 8)),
    "llama output": ("bquh,uhm->bqm", (2, 5, 4, 8), (None, 48)),
    "gpt2 query": ("abc,cde->abde", (2, 5, 48), (None, 4, 8)),
    "gemma query": ("btd,ndh->btnh", (2, 5, 48), (None, 4, 8)),
    "gemma output": ("btnh,nhd->btd", (2, 5, 4, 8), (None, 48)),
    "gemma feedforward": ("btd,df->btf", (2, 5, 48), (None, 64)),
    "odd outputs": ("btd,df->btf", (2, 5, 48), (None, 37)),
}


def kernel_layer(form, dtype="float32", seed=0):
    """A built layer of that form with random kernel and bias, and an input for it."""
    equation, input_shape, output_shape = KERNEL_FORMS[form]
    rng = np.random.default_rng(seed)
    # Not at random, which JAX would compile for each shape.
    given = {"kernel_initializer": "zeros", "dtype": dtype}
    if equation is None:
        layer = keras.layers.Dense(output_shape, name="dense", **given)
    else:
        layer = keras.layers.EinsumDense(
            equation, output_shape, bias_axes=equation[-1], name="einsum", **given
        )
    layer.build(input_shape)
    for variable in layer.weights:
        variable.assign(rng.normal(size=variable.shape, scale=0.3))
    return layer, rng.normal(size=input_shape).astype("float32")


def _value(variable):
    value = keras.ops.convert_to_numpy(getattr(variable, "value", variable))
    return value.astype("float64") if value.dtype.kind not in "iu" else value


def _unpack(packed, length, axis):
    packed = np.moveaxis(packed, axis, 0).astype(np.int64) & 0xFF
    codes = np.stack([packed & 15, packed >> 4], 1).reshape(-1, *packed.shape[1:])[:length]
    return np.moveaxis(codes, 0, axis)


def _signed(codes):
    return np.where(codes > 7, codes - 16, codes)


def _keras_rows(shape):
    if len(shape) == 2:
        return shape[0]
    return shape[0] if shape.index(max(shape)) == 0 else shape[0] * shape[1]


def read_kernel(layer, kernel_shape):
    """The float64 kernel that a quantized Dense or EinsumDense layer represents."""
    mode = layer.quantization_mode
    shape = tuple(kernel_shape)
    if mode in ("gptq", "awq"):
        rows = _keras_rows(shape)
        columns = int(np.prod(shape)) // rows
        codes = _value(layer.quantized_kernel)
        if mode == "awq" or layer.dtype_policy.weight_bits == 4:
            codes = _unpack(codes, columns, 0)
        group = _value(layer.g_idx).astype(int)
        zero, scale = _value(layer.kernel_zero).astype(int), _value(layer.kernel_scale)
        values = (codes.astype(int) - zero[:, group]) * scale[:, group]
        if mode == "awq":
            values = values / _value(layer.awq_scales)
        return values.T.reshape(shape)
    if mode == "int8":
        scale = _value(layer.kernel_scale)
        if isinstance(layer, keras.layers.EinsumDense):
            _, kernel, output = layer.equation.replace("->", ",").split(",")
            kept = [label for label in output if label in kernel]
            scale = scale.reshape([shape[kernel.index(label)] for label in kept])
            in_kernel_order = [kept.index(label) for label in kernel if label in kept]
            scale = scale.transpose(in_kernel_order)
            for axis, label in enumerate(kernel):
                if label not in output:
                    scale = np.expand_dims(scale, axis)
        return _value(layer._kernel) / scale
    if mode == "int4":
        if isinstance(layer, keras.layers.EinsumDense):
            _, kernel, output = layer.equation.replace("->", ",").split(",")
            outputs = int(np.prod([shape[i] for i, label in enumerate(kernel) if label in output]))
        else:
            outputs = shape[1]
        codes = _signed(_unpack(_value(layer._kernel), outputs, -1))
        return _grouped_or_channel(codes, layer, "kernel", axis=0).reshape(shape)
    assert mode == "float8"
    return _float8(_value(layer._kernel), _value(layer.kernel_scale))


def read_experts(data):
    """The float64 variables [experts, in, out] that a file of codes stands for, by path."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = safetensors.numpy.load(data)
    found = {}
    for path, text in header["__metadata__"].items():
        said = json.loads(text)
        bits, inputs = said["bits"], said["in_features"]
        stream = np.unpackbits(tensors[f"{path}.codes"].view(np.uint8), axis=-1, bitorder="little")
        places = stream[..., : bits * inputs].reshape(*stream.shape[:-1], inputs, bits)
        codes = places.astype(np.int64) @ (1 << np.arange(bits))
        zeros = tensors.get(f"{path}.zeros", np.full((1, 1, 1), 1 << (bits - 1)))
        scales = tensors[f"{path}.scales"].astype("float64")
        group = np.arange(inputs) // (inputs if said["group_size"] == -1 else said["group_size"])
        zeros = np.broadcast_to(zeros, scales.shape).astype(np.int64)
        values = (codes - zeros[..., group]) * scales[..., group]
        found[path] = values.transpose(0, 2, 1)
    return found


def _grouped_or_channel(codes, layer, prefix, axis):
    scale = _value(getattr(layer, f"{prefix}_scale"))
    zero = getattr(layer, f"{prefix}_zero", None)
    if zero is None:
        return codes / np.expand_dims(scale, axis)
    group = _value(layer.g_idx).astype(int)
    return (codes - np.take(_value(zero), group, axis)) * np.take(scale, group, axis)


def _float8(value, scale):
    scale = np.float32(scale)
    clipped = np.clip(np.asarray(value, "float32") / scale, -448, 448)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype("float64") * scale


def _int8_activations(inputs, axes):
    """What Keras' AbsMaxQuantizer does at run time, in the same float32 arithmetic."""
    inputs = inputs.astype("float32")
    scale = np.float32(127) / (np.abs(inputs).max(axes, keepdims=True) + np.float32(1e-7))
    return np.clip(np.round(inputs * scale), -127, 127).astype("float64") / scale


def run_layer(layer, kernel, inputs):
    """The layer's expected output with this kernel, in float64."""
    equation = getattr(layer, "equation", "...i,io->...o")
    source, _, output = equation.replace("->", ",").split(",")
    mode = layer.quantization_mode
    if mode == "int8" and layer.inputs_quantizer is not None:
        axes = (
            (-1,)
            if "..." in equation
            else tuple(i for i, label in enumerate(source) if label not in output)
        )
        inputs = _int8_activations(inputs, axes)
    bias = np.zeros(()) if layer.bias is None else _value(layer.bias)
    if mode == "float8":
        inputs = _float8(inputs, _value(layer.inputs_scale))
        # In this mode Keras rounds the bias to bfloat16.
        bias = bias.astype(ml_dtypes.bfloat16).astype("float64")
    return np.einsum(equation, inputs.astype("float64"), kernel) + bias


def read_table(layer, *, reverse=False):
    """The float64 table [tokens, vector] of a quantized embedding, or of its untied output head."""
    prefix = "reverse_embeddings" if reverse else "embeddings"
    codes = _value(layer.reverse_embeddings if reverse else layer._embeddings)
    if layer.quantization_mode == "int4":
        codes = _signed(_unpack(codes, layer.output_dim, 0 if reverse else -1))
    table = _grouped_or_channel(codes, layer, prefix, axis=0 if reverse else -1)
    return table.T if reverse else table
