"""Kernel layouts: every view holds the same numbers, and the equation decides what is summed."""

import numpy as np
import pytest

from quantizer import LayerError, solve
from quantizer.errors import CalibrationError
from quantizer.keras_format.kernel_layout import dense_layout, einsum_layout, row_groups
from quantizer.keras_format.variables import encode_kernel
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme

# equation, kernel shape, input shape
FORMS = {
    "llama query": ("bqm,muh->bquh", (48, 4, 8), (2, 5, 48)),
    "llama output": ("bquh,uhm->bqm", (4, 8, 48), (2, 5, 4, 8)),
    "gpt2 query": ("abc,cde->abde", (48, 4, 8), (2, 5, 48)),
    "gemma query": ("btd,ndh->btnh", (4, 48, 8), (2, 5, 48)),
    "gemma output": ("btnh,nhd->btd", (4, 8, 48), (2, 5, 4, 8)),
    "gemma feedforward": ("btd,df->btf", (48, 64), (2, 5, 48)),
    "largest axis summed, second not": ("bquh,uhm->bqm", (32, 2, 24), (2, 5, 32, 2)),
    "largest axis last": ("bqm,muh->bquh", (8, 4, 16), (2, 5, 8)),
    "outputs first": ("ab,cb->ac", (40, 48), (5, 48)),
    "summed axes swapped": ("bhu,uhm->bm", (4, 8, 48), (5, 8, 4)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_matrix_times_flat_inputs_is_the_einsum(form):
    equation, shape, input_shape = FORMS[form]
    rng = np.random.default_rng(0)
    kernel, inputs = rng.normal(size=shape), rng.normal(size=input_shape)
    layout = einsum_layout(equation, shape)
    flat = layout.flatten_inputs(inputs).reshape(-1, layout.in_features)
    outputs = np.einsum(equation, inputs, kernel)
    product = flat @ layout.to_matrix(kernel).T
    np.testing.assert_allclose(product.reshape(outputs.shape), outputs, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_views_of_a_kernel_are_inverses(form):
    equation, shape, _ = FORMS[form]
    layout = einsum_layout(equation, shape)
    kernel = np.arange(np.prod(shape)).reshape(shape)
    matrix = layout.to_matrix(kernel)
    assert matrix.shape == (layout.out_features, layout.in_features)
    np.testing.assert_array_equal(layout.from_matrix(matrix), kernel)


@pytest.mark.parametrize("scheme", [GPTQScheme(), Int4Scheme()], ids=lambda scheme: scheme.mode)
@pytest.mark.parametrize("form", FORMS)
def test_the_stored_matrix_is_the_kernel_reshaped(form, scheme):
    equation, shape, _ = FORMS[form]
    layout = einsum_layout(equation, shape)
    kernel = np.arange(np.prod(shape)).reshape(shape)
    matrix = layout.to_matrix(kernel)
    groups = row_groups(layout, scheme, form)
    if groups is None:
        np.testing.assert_array_equal(matrix.T.reshape(shape), kernel)
        return
    stored = groups.to_stored(matrix)
    assert not np.array_equal(stored, matrix)
    np.testing.assert_array_equal(stored.T.reshape(shape), kernel)
    np.testing.assert_array_equal(groups.to_matrix(stored), matrix)


def test_int8_and_float8_have_no_groups():
    for equation, shape, _ in FORMS.values():
        layout = einsum_layout(equation, shape)
        assert row_groups(layout, Int8Scheme(), "x") is row_groups(layout, Float8Scheme(), "x")
        assert row_groups(layout, Int8Scheme(), "x") is None


@pytest.mark.parametrize("form", FORMS)
def test_a_channel_scale_broadcasts_over_the_output(form):
    equation, shape, input_shape = FORMS[form]
    rng = np.random.default_rng(1)
    kernel, inputs = rng.normal(size=shape), rng.normal(size=input_shape)
    layout = einsum_layout(equation, shape)
    scale_R = rng.uniform(1, 2, layout.out_features)
    scaled = layout.from_matrix(layout.to_matrix(kernel) * scale_R[:, None])
    np.testing.assert_allclose(
        np.einsum(equation, inputs, scaled),
        np.einsum(equation, inputs, kernel) * layout.to_output(scale_R),
        atol=1e-12,
    )


def test_only_gemmas_query_among_real_kernels_is_stored_otherwise_than_its_matrix():
    otherwise = [
        form for form, (e, s, _) in FORMS.items() if not einsum_layout(e, s).keras_rows_are_inputs
    ]
    assert "gemma query" in otherwise
    real = ("llama query", "llama output", "gpt2 query", "gemma output", "gemma feedforward")
    assert not set(real) & set(otherwise)
    assert dense_layout((48, 40)).keras_rows_are_inputs


@pytest.mark.parametrize("equation", ["...x,xy->...y", "ab,bc", "abc,cd->abde", "a b,bc->ac"])
def test_an_equation_that_stock_keras_cannot_quantize_is_refused(equation):
    with pytest.raises(LayerError, match="equation"):
        einsum_layout(equation, (48, 4, 8))


def test_inputs_that_do_not_fit_are_refused():
    layout = einsum_layout("bquh,uhm->bqm", (4, 8, 48))
    for shape in [(2, 5, 8, 4), (2, 32), (32,)]:
        with pytest.raises(CalibrationError, match="do not fit"):
            layout.flatten_inputs(np.zeros(shape))


@pytest.mark.parametrize("scheme", [GPTQScheme(group_size=8), AWQScheme(group_size=8)])
def test_a_kernel_with_one_matrix_per_head_is_refused_by_name(scheme):
    layout = einsum_layout("bnh,nhd->bnd", (4, 8, 16))
    with pytest.raises(LayerError, match=r"decoder/experts.*int8"):
        row_groups(layout, scheme, "decoder/experts")


def test_int8_takes_a_kernel_with_one_matrix_per_head():
    kernel = np.random.default_rng(2).normal(size=(4, 8, 16)).astype("float32")
    layout = einsum_layout("bnh,nhd->bnd", kernel.shape)
    assert row_groups(layout, Int8Scheme(), "experts") is None
    result = solve(layout.to_matrix(kernel), None, Int8Scheme())
    variables = encode_kernel(result.weight, layout, Int8Scheme())
    restored = variables["kernel"] / variables["kernel_scale"][0][:, None, :]
    assert np.abs(restored - kernel).max() <= 0.5 / variables["kernel_scale"].min() * 1.001
    assert 0 < result.report.weight_error < 0.01


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("abe,cde->abcd", (4, 8, 48)),
        # More heads than inputs, or outputs: Keras' rows are the outputs.
        ("btd,ndh->btnh", (64, 32, 8)),
        ("ab,cb->ac", (64, 32)),
    ],
)
def test_rows_that_mix_inputs_have_no_awq_scale(equation, shape):
    layout = einsum_layout(equation, shape)
    with pytest.raises(LayerError, match=r"decoder/query.*mix inputs.*gptq"):
        row_groups(layout, AWQScheme(), "decoder/query")
    assert row_groups(layout, GPTQScheme(), "decoder/query") is not None
