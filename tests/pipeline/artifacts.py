"""Quantize a tiny preset into an artifact, and in place with Keras' own layers, for comparison."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.parts import Part, cut_parts, encode_part, weights_index
from pipeline.artifact.stock_reader import run_model
from pipeline.artifact.weights_file import read_weights_file
from pipeline.model.preset import INDEX_FILE, read_preset
from pipeline.model.preset_json import base_policy, layer_policy, policy_map, quantized_json
from pipeline.model.skeleton import build_skeleton
from pipeline.model.weight_layout import weight_layout
from quantizer import HessianSum, MagnitudeSum, Scheme, kernel_layout, quantize_layer, solve
from quantizer.keras_format.kernel_layout import row_groups
from quantizer.keras_format.variables import embedding_scheme, encode_embedding, encode_kernel
from tests.models.stock_load import load_stock
from tests.stock import read_kernel

Schemes = Mapping[str, Scheme]
"""By layer path."""

KERNELS = (keras.layers.Dense, keras.layers.EinsumDense)
TABLES = (keras.layers.Embedding, keras.layers.ReversibleEmbedding)


def blocks(backbone: Any) -> list[Any]:
    return [
        layer
        for layer in backbone.layers
        if layer._layers and any(type(child) in KERNELS for child in layer._flatten_layers())
    ]


def kernel_paths(source: Path) -> list[str]:
    """Paths of all Dense and EinsumDense layers in the blocks of a preset."""
    return [
        layer.path
        for block in blocks(build_skeleton(read_preset(str(source))).backbone)
        for layer in block._flatten_layers()
        if type(layer) in KERNELS
    ]


def source_values(source: Path, skeleton: Any) -> dict[str, NDArray[Any]]:
    """The float model's variables by place."""
    stored = read_weights_file((source / "model.weights.h5").read_bytes(), max_bytes=1 << 30)
    layout = weight_layout(skeleton.backbone)
    return {variable.name_path: stored[variable.h5_group][variable.index] for variable in layout}


def some_statistics(path: str, in_features: int, scheme: Scheme) -> HessianSum | MagnitudeSum:
    """Of correlated inputs; the same wherever they are asked for."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    mixing = rng.normal(size=(in_features, in_features)) / in_features**0.5 + np.eye(in_features)
    rows = (rng.normal(size=(4 * in_features, in_features)) @ mixing).astype("float32")
    return MagnitudeSum.of(rows) if scheme.mode == "float8" else HessianSum.of(rows)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    parts: tuple[Part, ...]
    files: dict[str, bytes]


def encode(source: Path, schemes: Schemes) -> Encoded:
    """The artifact's own files: shards, index, config.json and task.json."""
    preset = read_preset(str(source))
    original = build_skeleton(preset)
    policies = {path: layer_policy(scheme) for path, scheme in schemes.items()}
    quantized = build_skeleton(preset, policy_map(base_policy(original.backbone_json), policies))
    values = source_values(source, original)
    layers = {layer.path: layer for layer in original.backbone._flatten_layers()}
    parts = cut_parts(weight_layout(quantized.backbone), blocks(quantized.backbone))
    for path, scheme in schemes.items():
        [part] = [p for p in parts if any(v.layer_path == path for v in p.variables)]
        solved = _solve(path, layers[path], scheme, original, values)
        values |= part.layer_values(path, solved)
    files = {
        part.file: encode_part(part, {v.name_path: values[v.name_path] for v in part.variables})
        for part in parts
    }
    files[INDEX_FILE] = weights_index(parts)
    files |= quantized_json(preset.json_files, policies)
    return Encoded(parts=parts, files=files)


def _solve(
    path: str, layer: Any, scheme: Scheme, original: Any, values: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    own = {
        variable.name: np.asarray(values[variable.name_path], "float32")
        for variable in weight_layout(original.backbone)
        if variable.layer_path == path
    }
    options: dict[str, Any] = {"scale_dtype": layer.variable_dtype, "name": path}
    if type(layer) in TABLES:
        table = solve(own["embeddings"], None, scheme, **options).weight
        reverse = None
        if "reverse_embeddings" in own:
            reverse = solve(own["reverse_embeddings"].T, None, scheme, **options).weight
        return encode_embedding(table, reverse, embedding_scheme(scheme, path))
    layout = kernel_layout(layer)
    statistics = some_statistics(path, layout.in_features, scheme)
    options["row_groups"] = row_groups(layout, scheme, path)
    result = solve(layout.to_matrix(own["kernel"]), statistics, scheme, **options)
    return encode_kernel(result.weight, layout, scheme)


def write(source: Path, target: Path, schemes: Schemes) -> Encoded:
    """A whole preset directory."""
    encoded = encode(source, schemes)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.weights*"))
    for name, content in encoded.files.items():
        (target / name).write_bytes(content)
    return encoded


def load(preset: Path, dtype: str | None = None) -> Any:
    """As a user does; without a dtype KerasHub turns a float preset into float32."""
    name = json.loads((preset / "task.json").read_text(encoding="utf-8"))["class_name"]
    return load_stock(getattr(keras_hub.models, name), preset, dtype=dtype)


def quantize_in_place(task: Any, schemes: Schemes) -> Any:
    """Quantize a live model's layers, without any file."""
    for layer in task.backbone._flatten_layers():
        if layer.path in schemes:
            scheme, statistics = schemes[layer.path], None
            if type(layer) in KERNELS:
                statistics = some_statistics(layer.path, kernel_layout(layer).in_features, scheme)
            quantize_layer(layer, scheme, statistics)
            if type(layer) is keras.layers.ReversibleEmbedding:
                # Given by a preset's policy, int4 too quantizes what goes the way back.
                layer.inputs_quantizer = keras.quantizers.AbsMaxQuantizer(axis=-1)
    return task


def restore(task: Any, quantized: Any) -> dict[str, float]:
    """Give a float model the weights that a quantized one stands for.

    Returns:
        How far they are from its own, relative, by layer path.
    """
    errors = {}
    pairs = zip(task.backbone._flatten_layers(), quantized.backbone._flatten_layers(), strict=True)
    for layer, other in pairs:
        if getattr(other, "quantization_mode", None) is None or type(layer) not in KERNELS:
            continue
        assert layer.path == other.path
        other._dtype_policy = other.dtype_policy[other.path]  # as `read_kernel` wants it
        original = np.asarray(layer._kernel.value, "float64")
        restored = read_kernel(other, original.shape)
        errors[layer.path] = float(np.linalg.norm(restored - original) / np.linalg.norm(original))
        layer._kernel.assign(restored)
    return errors


def some_tokens(task: Any, shape: Sequence[int] = (2, 12)) -> NDArray[np.int32]:
    vocabulary = task.backbone.vocabulary_size
    return np.random.default_rng(7).integers(0, vocabulary, shape, dtype="int32")


def run(task: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """What a task answers to token ids."""
    return run_model(task, tokens)
