"""Arrays that a user gives are what the model takes, or refused by name with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.calibration.arrays import ExpectedInput, read_arrays
from pipeline.errors import CalibrationInputError

IMAGES = {"images": ExpectedInput(shape=(4, None, 3), dtype="float32")}


def given(folder: Path, array: Any, name: str = "images") -> dict[str, str]:
    np.save(folder / "array.npy", array, allow_pickle=True)
    return {name: str(folder / "array.npy")}


def test_the_first_samples_come_in_the_dtype_of_the_input(tmp_path: Path) -> None:
    pixels = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
    found = read_arrays(given(tmp_path, pixels), IMAGES, num_samples=2)["images"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, pixels[:2])


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((2, 4, 5)), r"has the shape \[2, 4, 5\] .* takes \[samples, 4, any, 3\]; save"),
        (np.zeros((2, 5, 5, 3)), r"has the shape \[2, 5, 5, 3\] where"),
        (np.zeros((0, 4, 5, 3)), r"has the shape \[0, 4, 5, 3\] where"),
        (np.zeros((1, 4, 5, 3)), "holds 1 samples, but num_samples is 2; set num_samples to at"),
        (np.full((2, 4, 5, 3), np.nan), "sample 0 holds NaN or infinity; leave it out"),
        (np.full((2, 4, 5, 3), 1e300), "holds values beyond float32; scale them"),
        (np.zeros((2, 4, 5, 3), complex), "holds complex128 where the model takes float32"),
        (np.full((2, 4, 5, 3), None), "cannot be read .*allow_pickle.*; write it with numpy.save"),
    ],
)
def test_an_array_that_the_input_cannot_take_is_refused(
    array: Any, expected: str, tmp_path: Path
) -> None:
    urls = given(tmp_path, array)
    with pytest.raises(CalibrationInputError, match=expected) as error:
        read_arrays(urls, IMAGES, num_samples=2)
    assert str(error.value).startswith(f"calibration.inputs.images: {urls['images']}: ")


def test_floats_are_no_tokens_and_large_integers_do_not_wrap(tmp_path: Path) -> None:
    tokens = {"token_ids": ExpectedInput(shape=(None,), dtype="int32")}
    for array, expected in (
        (np.zeros((1, 2)), "holds float64 where the model takes int32"),
        (np.full((1, 2), 2**40), "holds values beyond int32"),
    ):
        with pytest.raises(CalibrationInputError, match=expected):
            read_arrays(given(tmp_path, array, "token_ids"), tokens, num_samples=1)


def test_a_file_that_is_no_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    for content, expected in (
        (b"hello", "not a .npy file; write it with"),
        (b"\x93NUMPY\x01\x00", "cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(CalibrationInputError, match=expected):
            read_arrays({"images": str(path)}, IMAGES, num_samples=1)
    with pytest.raises(CalibrationInputError, match="no such file"):
        read_arrays({"images": str(tmp_path / "none.npy")}, IMAGES, num_samples=1)


def test_an_input_that_the_model_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    urls = given(tmp_path, np.zeros((1, 4, 5, 3)), "image")
    with pytest.raises(CalibrationInputError, match="no such input; its inputs are images"):
        read_arrays(urls, IMAGES, num_samples=1)
