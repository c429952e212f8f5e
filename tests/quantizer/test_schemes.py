"""Schemes are checked once, when made, and round-trip through plain dicts."""

import dataclasses
import json
import subprocess
import sys

import keras
import pytest

from quantizer import (
    SCHEMES,
    AWQScheme,
    Float8Scheme,
    GPTQScheme,
    Int4Scheme,
    Int8Scheme,
    QuantizationError,
    SchemeError,
    scheme_from_dict,
    scheme_to_dict,
)

BAD_VALUES = [
    (GPTQScheme, "weight_bits", 5, "2, 3, 4 or 8"),
    (GPTQScheme, "weight_bits", True, "must be int"),
    (GPTQScheme, "weight_bits", 4.0, "must be int"),
    (GPTQScheme, "weight_bits", "4", "must be int"),
    (GPTQScheme, "group_size", 0, "-1 .* or positive"),
    (GPTQScheme, "group_size", -2, "-1 .* or positive"),
    (GPTQScheme, "group_size", True, "must be int"),
    (GPTQScheme, "group_size", None, "must be int"),
    (GPTQScheme, "symmetric", 1, "must be bool"),
    (GPTQScheme, "activation_order", "yes", "must be bool"),
    (GPTQScheme, "scale_search", None, "must be bool"),
    (GPTQScheme, "hessian_damping", 2, "between 0 and 1"),
    (GPTQScheme, "hessian_damping", -0.1, "between 0 and 1"),
    (GPTQScheme, "hessian_damping", float("nan"), "between 0 and 1"),
    (GPTQScheme, "hessian_damping", True, "must be float"),
    (GPTQScheme, "correlation_shrinkage", -1.0, "between 0 and 100"),
    (GPTQScheme, "drift_correction", 1.5, "between 0 and 1"),
    (GPTQScheme, "drift_correction", "1", "must be float"),
    (AWQScheme, "weight_bits", 8, "must be 4"),
    (AWQScheme, "weight_bits", True, "must be int"),
    (AWQScheme, "group_size", 0, "-1 .* or positive"),
    (AWQScheme, "num_grid_points", 0, "must be positive"),
    (AWQScheme, "num_grid_points", 2.5, "must be int"),
    (AWQScheme, "clip_search", 1, "must be bool"),
    (AWQScheme, "foldable", 1, "must be bool"),
    (Int8Scheme, "quantize_activations", 0, "must be bool"),
    (Int4Scheme, "block_size", 0, "-1 .* or positive"),
    (Int4Scheme, "block_size", True, "must be int"),
    (Float8Scheme, "power_of_two", "true", "must be bool"),
]


def ids(case):
    return getattr(case, "__name__", str(case))


@pytest.mark.parametrize(("kind", "field", "value", "message"), BAD_VALUES, ids=ids)
def test_a_bad_value_is_refused_with_what_is_allowed(kind, field, value, message):
    with pytest.raises(SchemeError, match=rf"{kind.__name__}\.{field} must .*") as caught:
        kind(**{field: value})
    assert message.partition(" .* ")[0] in str(caught.value)
    assert str(value).strip("'") in str(caught.value)
    with pytest.raises(SchemeError):
        scheme_from_dict({"mode": kind.mode, field: value})


SAMPLES = [
    GPTQScheme(weight_bits=3, group_size=-1, symmetric=True, drift_correction=0.5),
    GPTQScheme(hessian_damping=0),
    GPTQScheme(refinement_sweeps=1, scale_refit=True, correlation_shrinkage=2.0),
    AWQScheme(num_grid_points=4),
    AWQScheme(foldable=True),
    Int8Scheme(quantize_activations=False),
    Int4Scheme(block_size=-1),
    Float8Scheme(power_of_two=True),
    *(kind() for kind in SCHEMES.values()),
]


@pytest.mark.parametrize("scheme", SAMPLES, ids=str)
def test_a_scheme_comes_back_from_json(scheme):
    values = json.loads(json.dumps(scheme_to_dict(scheme)))
    assert next(iter(values)) == "mode"
    assert scheme_from_dict(values) == scheme


@pytest.mark.parametrize("mode", SCHEMES)
def test_absent_fields_take_their_defaults(mode):
    assert scheme_from_dict({"mode": mode}) == SCHEMES[mode]()


def test_what_older_versions_did_not_know_is_left_out_by_default():
    assert "foldable" not in scheme_to_dict(AWQScheme())
    assert scheme_to_dict(AWQScheme(foldable=True))["foldable"] is True
    assert not {"scale_refit", "correlation_shrinkage"} & set(scheme_to_dict(GPTQScheme()))


def test_reading_a_dict_leaves_it_alone():
    values = {"mode": "gptq", "weight_bits": 3}
    scheme_from_dict(values)
    assert values == {"mode": "gptq", "weight_bits": 3}


@pytest.mark.parametrize("mode", ["GPTQ", "gguf", None, 4])
def test_an_unknown_mode_names_those_there_are(mode):
    with pytest.raises(SchemeError, match="choose one of gptq, awq, int8, int4, float8"):
        scheme_from_dict({"mode": mode})


def test_a_missing_mode_names_those_there_are():
    with pytest.raises(SchemeError, match="choose one of gptq"):
        scheme_from_dict({"weight_bits": 4})


def test_a_mode_that_cannot_be_a_key_is_refused_too():
    with pytest.raises(SchemeError, match="unknown scheme mode"):
        scheme_from_dict({"mode": ["gptq"]})


def test_an_unknown_field_names_those_there_are():
    with pytest.raises(SchemeError, match=r"no field 'bits', 'damp'; its fields are weight_bits"):
        scheme_from_dict({"mode": "gptq", "damp": 1, "bits": 4})


def test_a_field_that_is_not_a_name_is_refused_too():
    with pytest.raises(SchemeError, match="no field"):
        scheme_from_dict({"mode": "gptq", 3: 4, "bits": 4})


def test_errors_are_value_errors_of_one_family():
    assert issubclass(SchemeError, QuantizationError)
    assert issubclass(QuantizationError, ValueError)


@pytest.mark.parametrize("scheme", SAMPLES, ids=str)
def test_a_scheme_cannot_be_changed(scheme):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(scheme, dataclasses.fields(scheme)[0].name, 8)


@pytest.mark.parametrize("scheme", SAMPLES, ids=str)
def test_every_field_is_documented(scheme):
    for field in dataclasses.fields(scheme):
        assert field.metadata["doc"].endswith(".")


@pytest.mark.parametrize(
    ("scheme", "policy"),
    [
        (GPTQScheme(weight_bits=3, group_size=-1), "gptq/3/-1"),
        (AWQScheme(), "awq/4/128"),
        (Int8Scheme(), "int8"),
        (Int4Scheme(block_size=64), "int4/64"),
        (Float8Scheme(), "float8"),
    ],
    ids=str,
)
def test_policies_are_those_of_keras(scheme, policy):
    assert scheme.policy == policy
    assert keras.dtype_policies.get(f"{policy}_from_float32").quantization_mode == scheme.mode


def test_naming_schemes_imports_neither_jax_nor_keras():
    program = (
        "import sys, quantizer; quantizer.GPTQScheme(); "
        "sys.exit(bool({'jax', 'keras', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
