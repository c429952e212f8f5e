"""Read the arrays that a user gives for a model's inputs, such as images or audio features.

Each input has a .npy file that holds a sample per row, [N, …]. Nothing in it is run: pickled
objects are refused.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CalibrationInputError
from pipeline.storage.user_files import driver_errors, find_given_files, open_given_file


@dataclass(frozen=True, kw_only=True)
class ExpectedInput:
    """What a model takes as one of its inputs.

    Attributes:
        shape: of one sample; None where any size fits.
        dtype: of the model's input; a file may hold another of the same kind.
    """

    shape: tuple[int | None, ...]
    dtype: str


def read_arrays(
    urls: Mapping[str, str], expected: Mapping[str, ExpectedInput], *, num_samples: int
) -> dict[str, NDArray[Any]]:
    """The first samples of the arrays that a user gives, in the model's dtypes, by input.

    Args:
        urls: a .npy file, by input.
        expected: all inputs of the model, by name.
        num_samples: how many to take of each.

    Raises:
        CalibrationInputError: no such input or file, or an array that the input cannot take.
    """
    unknown = sorted(set(urls) - set(expected))
    if unknown:
        raise CalibrationInputError(
            f"calibration.inputs.{unknown[0]}: the model has no such input; its inputs are "
            f"{', '.join(sorted(expected))}"
        )
    found = {}
    for name in sorted(urls):
        where = f"calibration.inputs.{name}: {urls[name]}"
        array = checked_array(read_array(urls[name], where=where), expected[name], where=where)
        if len(array) < num_samples:
            raise CalibrationInputError(
                f"{where}: holds {len(array)} samples, but num_samples is {num_samples}; set "
                f"num_samples to at most {len(array)}, or give more samples"
            )
        found[name] = np.ascontiguousarray(array[:num_samples])
    return found


def read_array(url: str, *, where: str) -> NDArray[Any]:
    """The array in a .npy file.

    Args:
        where: what an error begins with.

    Raises:
        CalibrationInputError: no such file, or one that holds no plain array.
    """
    files = find_given_files(url, error_type=CalibrationInputError)
    if len(files) > 1:
        raise CalibrationInputError(f"{where}: {len(files)} files; name one .npy file")
    with driver_errors(where, CalibrationInputError), open_given_file(files[0]) as stream:
        content = stream.read()
    remedy = "write it with numpy.save(file, array), as an array of numbers [samples, …]"
    if not content.startswith(np.lib.format.MAGIC_PREFIX):
        raise CalibrationInputError(f"{where}: not a .npy file; {remedy}")
    try:
        # Objects would be pickles, which run code. The header may promise more than there is.
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationInputError(f"{where}: cannot be read ({reason}); {remedy}") from None
    assert isinstance(array, np.ndarray)
    return array


def checked_array(array: NDArray[Any], expected: ExpectedInput, *, where: str) -> NDArray[Any]:
    """An array in an input's dtype.

    Args:
        where: what an error begins with.

    Raises:
        CalibrationInputError: another shape or kind of numbers, or values that are not finite.
    """
    shape = array.shape[1:]
    if array.ndim == 0 or len(array) == 0 or not _fits(shape, expected.shape):
        raise CalibrationInputError(
            f"{where}: has the shape {list(array.shape)} where the model takes "
            f"{_shape_text(expected.shape)}; save the samples that the model's own preprocessor "
            "makes"
        )
    dtype = np.dtype(expected.dtype) if expected.dtype != "bfloat16" else np.dtype(np.float32)
    # Integers are numbers to a float input; a float is no token.
    allowed = {"f": "fiub", "i": "iub", "u": "iub", "b": "b"}[dtype.kind]
    if array.dtype.kind not in allowed:
        raise CalibrationInputError(
            f"{where}: holds {array.dtype} where the model takes {expected.dtype}; convert it"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        sample = int(np.argwhere(~np.isfinite(array))[0][0])
        raise CalibrationInputError(
            f"{where}: sample {sample} holds NaN or infinity; leave it out, or mend it"
        )
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(converted).all():
        raise CalibrationInputError(f"{where}: holds values beyond {dtype}; scale them")
    if dtype.kind in "iu" and not np.array_equal(converted, array):
        raise CalibrationInputError(f"{where}: holds values beyond {dtype}; check the file")
    return converted


def _fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(
        wanted in (None, size) for size, wanted in zip(shape, expected, strict=True)
    )


def _shape_text(shape: Sequence[int | None]) -> str:
    return f"[samples, {', '.join('any' if size is None else str(size) for size in shape)}]"
