from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.artifact.bit_packing import unpack_bits
from pipeline.errors import ExportError
from pipeline.export.code_formats import CodeFormat, code_format
from pipeline.export.codes import Matrix
from pipeline.export.formats import check_format, compressed_tensors, gptq, quantization_config
from pipeline.export.kernels import serving_kernel
from quantizer.schemes import GPTQScheme, Int8Scheme

FOUR = CodeFormat(bits=4, symmetric=False, group_size=32)
THREE = CodeFormat(bits=3, group_size=32)
INT8 = CodeFormat(bits=8, activations="int8")
FLOAT8 = CodeFormat(bits=8, is_float=True, activations="float8")


def matrix(found: CodeFormat) -> Matrix:
    random = np.random.default_rng(3)
    num_groups = 1 if found.group_size == -1 else 64 // found.group_size
    codes = random.integers(0, 2**found.bits, (32, 64)).astype(np.uint8)
    zero = random.integers(0, 2**found.bits, (32, num_groups)).astype(np.uint8)
    return Matrix(
        format=found,
        codes_RC=codes,
        scale_RG=random.random((32, num_groups), np.float32),
        zero_RG=np.full_like(zero, 2 ** (found.bits - 1)) if found.symmetric else zero,
    )


def test_compressed_tensors_stores_codes_scales_shape_and_zero_points() -> None:
    given = matrix(FOUR)
    stored = compressed_tensors("m", given, np.dtype(np.float16))
    assert set(stored) == {
        *("m.weight_packed", "m.weight_scale", "m.weight_shape", "m.weight_zero_point"),
    }
    np.testing.assert_array_equal(unpack_bits(stored["m.weight_packed"], 4, 64), given.codes_RC)
    zero = unpack_bits(np.ascontiguousarray(stored["m.weight_zero_point"].T), 4, 32).T
    np.testing.assert_array_equal(zero, given.zero_RG)
    assert stored["m.weight_scale"].dtype == np.float16
    assert stored["m.weight_shape"].tolist() == [32, 64]


def test_a_symmetric_layer_has_no_zero_points() -> None:
    assert "m.weight_zero_point" not in compressed_tensors("m", matrix(THREE), np.dtype("f4"))


def test_int8_is_stored_signed_and_its_scale_in_float32() -> None:
    given = matrix(INT8)
    stored = compressed_tensors("m", given, np.dtype(np.float16))
    assert stored["m.weight"].dtype == np.int8
    np.testing.assert_array_equal(stored["m.weight"].astype(int), given.codes_RC.astype(int) - 128)
    assert stored["m.weight_scale"].dtype == np.float32


@pytest.mark.parametrize("found", [FOUR, THREE, CodeFormat(bits=8, group_size=-1)])
def test_gptq_decodes_to_the_same_weights(found: CodeFormat) -> None:
    given = matrix(found)
    stored = gptq("m", given, np.dtype(np.float32))
    codes = unpack_bits(np.ascontiguousarray(stored["m.qweight"].T), found.bits, 64)
    # Readers of the old format, which symmetric layers are stored in, add one.
    zero = unpack_bits(stored["m.qzeros"], found.bits, 32).astype(int) + found.symmetric
    group = stored["m.g_idx"]
    values = (codes.T - zero[group]) * stored["m.scales"][group]
    zeros_RC = given.zero_RG[:, group].astype(int)
    np.testing.assert_array_equal(values.T, (given.codes_RC - zeros_RC) * given.scale_RG[:, group])


def test_each_scheme_is_a_config_group_that_names_its_modules() -> None:
    formats = {"a": FOUR, "b": THREE, "c": FOUR, "d": INT8}
    config = quantization_config("compressed-tensors", formats, ("lm_head",))
    assert config is not None
    groups = list(config["config_groups"].values())
    assert [group["targets"] for group in groups] == [["a", "c"], ["b"], ["d"]]
    assert [group["weights"]["num_bits"] for group in groups] == [4, 3, 8]
    assert [group["weights"]["symmetric"] for group in groups] == [False, True, True]
    assert [group["format"] for group in groups] == [
        *("pack-quantized", "pack-quantized", "int-quantized"),
    ]
    assert groups[2]["input_activations"]["dynamic"] is True
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["lm_head"]
    json.dumps(config)


def test_groups_never_follow_an_activation_order() -> None:
    scheme = GPTQScheme(activation_order=True, group_size=32)
    found = code_format(scheme)
    assert found is not None
    config = quantization_config("compressed-tensors", {"a": found}, ())
    assert config is not None
    assert config["config_groups"]["group_0"]["weights"]["actorder"] is None
    gptq_config = quantization_config("gptq", {"a": found}, ("model.layers.0.gate",))
    assert gptq_config is not None
    assert gptq_config["desc_act"] is False
    assert gptq_config["checkpoint_format"] == "gptq_v2"
    assert list(gptq_config["dynamic"]) == [r"-:^model\.layers\.0\.gate$"]


def test_a_dense_checkpoint_says_nothing_of_quantization() -> None:
    assert quantization_config("dense", {}, ("a",)) is None


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"a": FOUR, "b": THREE}, "a has 4 bits, asymmetric.* b has 3 bits, symmetric"),
        ({"a": INT8}, "a: a gptq checkpoint holds no 8 bits, int8 inputs"),
        ({"a": FLOAT8}, "a: a gptq checkpoint holds no float8"),
    ],
)
def test_gptq_refuses_what_its_checkpoints_cannot_hold(
    formats: dict[str, CodeFormat], message: str
) -> None:
    check_format("compressed-tensors", formats)
    with pytest.raises(ExportError, match=f"{message}.*--format compressed-tensors"):
        check_format("gptq", formats)


@pytest.mark.parametrize(
    ("found", "kernel", "reason"),
    [
        (CodeFormat(bits=4, group_size=128), "Machete or Marlin", ""),
        (CodeFormat(bits=4, group_size=32), "Marlin", ""),
        (CodeFormat(bits=4, group_size=-1), "Machete or Marlin", ""),
        (CodeFormat(bits=4, group_size=48), "", "groups of 48"),
        (CodeFormat(bits=8, group_size=32, symmetric=False), "", "groups of 32"),
        (THREE, "Humming", "3 bits"),
        (INT8, "w8a8 int8", ""),
        (FLOAT8, "w8a8 float8", ""),
    ],
)
def test_the_kernel_that_serves_a_layer(found: CodeFormat, kernel: str, reason: str) -> None:
    served = serving_kernel("mlp.down_proj", "compressed-tensors", {"mlp.down_proj": found})
    assert served.name == kernel
    assert served.reason.startswith(reason)


def test_layers_that_are_fused_need_one_scheme() -> None:
    names = ("q_proj", "k_proj", "v_proj")
    formats = dict.fromkeys((f"attn.{name}" for name in names), FOUR) | {"attn.v_proj": THREE}
    served = serving_kernel("attn.q_proj", "compressed-tensors", formats)
    assert (served.name, "attn.v_proj" in served.reason) == ("", True)


def test_vllm_reads_symmetric_gptq_checkpoints_only() -> None:
    assert serving_kernel("a", "gptq", {"a": FOUR}).name == ""
    assert serving_kernel("a", "gptq", {"a": CodeFormat(bits=4, group_size=32)}).name == "Marlin"


def test_int8_without_rounded_inputs_is_packed() -> None:
    found = code_format(Int8Scheme(quantize_activations=False))
    assert found is not None
    stored = compressed_tensors("m", matrix(found), np.dtype(np.float32))
    assert stored["m.weight_packed"].shape == (32, 16)
