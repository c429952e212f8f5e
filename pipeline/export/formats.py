"""Matrices of codes as tensors of a checkpoint, and what its config.json says of them.

compressed-tensors is read by transformers, vLLM and SGLang; gptq by GPTQModel, transformers and
vLLM. Ours has no activation order to store: groups always are runs of the original inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ExportError
from pipeline.export.code_formats import CodeFormat, ExportFormat
from pipeline.export.codes import Matrix
from pipeline.export.experts import check_experts, targets
from pipeline.export.packing import pack_gptq, pack_quantized

Tensors = dict[str, NDArray[Any]]
Formats = Mapping[str, CodeFormat]
"""The format of each quantized module, by its name."""


def compressed_tensors(module: str, matrix: Matrix, dtype: np.dtype[Any]) -> Tensors:
    """One layer in the format compressed-tensors.

    Args:
        dtype: of the scales of integer codes without rounded inputs, which transformers casts to
            the model's own; other scales stay in float32.
    """
    found = matrix.format
    if found.is_float or found.activations == "int8":
        codes = matrix.codes_RC
        if not found.is_float:
            codes = (codes.astype(np.int16) - 128).astype(np.int8)
        tensors: Tensors = {f"{module}.weight": codes, f"{module}.weight_scale": matrix.scale_RG}
        if matrix.input_scale is not None:
            tensors[f"{module}.input_scale"] = np.full(1, matrix.input_scale, np.float32)
        return tensors
    weight, zero = pack_quantized(
        matrix.codes_RC, None if found.symmetric else matrix.zero_RG, found.bits
    )
    tensors = {
        f"{module}.weight_packed": weight,
        f"{module}.weight_scale": matrix.scale_RG.astype(dtype),
        f"{module}.weight_shape": np.array(matrix.codes_RC.shape, np.int64),
    }
    if zero is not None:
        tensors[f"{module}.weight_zero_point"] = zero
    return tensors


def gptq(module: str, matrix: Matrix, dtype: np.dtype[Any]) -> Tensors:
    """One layer in the format of GPTQ checkpoints.

    Raises:
        ExportError: the layer does not fill whole words.
    """
    found = matrix.format
    in_features = matrix.codes_RC.shape[1]
    weight, zero = pack_gptq(
        matrix.codes_RC,
        matrix.zero_RG,
        found.bits,
        zero_minus_one=found.symmetric,
        name=module,
    )
    group_size = in_features if found.group_size == -1 else found.group_size
    return {
        f"{module}.qweight": weight,
        f"{module}.qzeros": zero,
        f"{module}.scales": np.ascontiguousarray(matrix.scale_RG.T).astype(dtype),
        f"{module}.g_idx": np.arange(in_features, dtype=np.int32) // np.int32(group_size),
    }


def check_format(as_format: ExportFormat, formats: Formats) -> None:
    """Check that a checkpoint of this format can hold these layers together.

    Raises:
        ExportError: it cannot.
    """
    if as_format != "gptq":
        check_experts(formats)
        return
    for module, found in formats.items():
        if found.is_float or found.activations != "float":
            raise ExportError(
                f"{module}: a gptq checkpoint holds no {found.described}; use --format "
                "compressed-tensors or dense"
            )
    first_of: dict[CodeFormat, str] = {}
    for module, found in formats.items():
        first_of.setdefault(found, module)
    if len(first_of) > 1:
        (a, first), (b, second) = list(first_of.items())[:2]
        raise ExportError(
            f"a gptq checkpoint has one scheme for all layers; {first} has {a.described}, and "
            f"{second} has {b.described}: use --format compressed-tensors or dense"
        )


def quantization_config(
    as_format: ExportFormat, formats: Formats, in_float: tuple[str, ...]
) -> dict[str, Any] | None:
    """The `quantization_config` of config.json; None for a dense checkpoint.

    Args:
        in_float: modules with a matrix that was not quantized.
    """
    if as_format == "dense" or not formats:
        return None
    if as_format == "gptq":
        return _gptq_config(formats, in_float)
    return _compressed_tensors_config(formats, in_float)


def _gptq_config(formats: Formats, in_float: tuple[str, ...]) -> dict[str, Any]:
    found = next(iter(formats.values()))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if found.symmetric else "gptq_v2",
        "bits": found.bits,
        "group_size": found.group_size,
        "sym": found.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    if in_float:
        # "-:" excludes what the pattern matches.
        config["dynamic"] = {f"-:^{module.replace('.', chr(92) + '.')}$": {} for module in in_float}
    return config


def _compressed_tensors_config(formats: Formats, in_float: tuple[str, ...]) -> dict[str, Any]:
    groups: dict[CodeFormat, list[str]] = {}
    for module, found in formats.items():
        groups.setdefault(found, []).append(module)
    layouts = sorted({_layout(found) for found in groups})
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layouts[0] if len(layouts) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{number}": {
                # By name: the class "Linear" would include layers that were left in float.
                "targets": targets(modules),
                "weights": _weight_arguments(found),
                "input_activations": _input_arguments(found),
                "output_activations": None,
                "format": _layout(found),
            }
            for number, (found, modules) in enumerate(groups.items())
        },
        "ignore": list(in_float),
        "kv_cache_scheme": None,
    }


def _layout(found: CodeFormat) -> str:
    if found.is_float:
        return "float-quantized"
    return "int-quantized" if found.activations == "int8" else "pack-quantized"


def _weight_arguments(found: CodeFormat) -> dict[str, Any]:
    grouped = found.group_size != -1
    return {
        "num_bits": found.bits,
        "type": "float" if found.is_float else "int",
        "symmetric": found.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": found.group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
    }


def _input_arguments(found: CodeFormat) -> dict[str, Any] | None:
    if found.activations == "float":
        return None
    per_token = found.activations == "int8"
    return {
        "num_bits": 8,
        "type": "int" if per_token else "float",
        "symmetric": True,
        "strategy": "token" if per_token else "tensor",
        "dynamic": per_token,
    }
