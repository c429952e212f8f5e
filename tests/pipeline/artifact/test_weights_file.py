"""A weights file holds exactly its arrays, in few bytes, the same bytes every time."""

import contextlib
import io
import os
import subprocess
import sys

import h5py
import ml_dtypes
import numpy as np
import pytest
from keras.src.saving.saving_lib import H5IOStore

from pipeline.artifact.weights_file import read_weights_file, weights_file_bytes
from pipeline.errors import WeightsFileError

LARGE = 1 << 24


def some_groups():
    rng = np.random.default_rng(0)
    return {
        "layers/dense/vars": [
            rng.normal(size=(40, 30)).astype("float32"),
            rng.normal(size=(30,)).astype(ml_dtypes.bfloat16),
        ],
        "layers/dense/_inner/vars": [
            rng.integers(0, 8, (130, 100), dtype="uint8"),
            rng.integers(0, 256, (130, 100), dtype="uint8"),
            rng.integers(-8, 8, (33,), dtype="int8"),
            np.asarray(0.5, "float32"),
            np.asarray(1.5, ml_dtypes.bfloat16),
            rng.normal(size=(5, 4)).astype("float16"),
        ],
        "vars": [np.arange(2, dtype="uint32"), np.zeros((0, 4), "float32")],
    }


def write(build):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        build(file)
    return buffer.getvalue()


def test_what_is_read_is_what_was_written():
    groups = some_groups()
    found = read_weights_file(weights_file_bytes(groups), max_bytes=LARGE)
    assert list(found) == sorted(groups)
    for name, arrays in groups.items():
        for array, read in zip(arrays, found[name], strict=True):
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert read.tobytes() == array.tobytes()


def test_keras_reads_the_same():
    groups = some_groups()
    store = H5IOStore(io.BytesIO(weights_file_bytes(groups)))
    for name, arrays in groups.items():
        entry = store.get(name.removesuffix("vars").rstrip("/"))
        assert len(entry) == len(arrays)
        for index, array in enumerate(arrays):
            assert entry[str(index)].dtype == array.dtype
            np.testing.assert_array_equal(entry[str(index)], array)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("shape", [(256, 512), (2000, 1024), (1, 3_000_000), (4096, 3)])
def test_low_bit_codes_take_their_bits_and_no_more(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape, dtype="uint8")
    data = weights_file_bytes({"vars": [codes]})
    assert len(data) <= codes.size * bits / 8 * 1.02 + 3000
    [read] = read_weights_file(data, max_bytes=codes.nbytes)["vars"]
    np.testing.assert_array_equal(read, codes)


@pytest.mark.parametrize("values", [[0], [7], [0, 7], [1, 2, 3], [4, 5]])
def test_codes_survive_whatever_range_they_use(values):
    codes = np.random.default_rng(1).choice(np.array(values, "uint8"), (100, 90))
    [read] = read_weights_file(weights_file_bytes({"vars": [codes]}), max_bytes=LARGE)["vars"]
    np.testing.assert_array_equal(read, codes)


def test_bytes_depend_on_the_arrays_alone():
    groups = some_groups()
    data = weights_file_bytes(groups)
    assert weights_file_bytes(dict(reversed(groups.items()))) == data
    # Another process, at another second, whose fresh memory is full of other bytes.
    script = (
        "import sys; from tests.pipeline.artifact.test_weights_file import some_groups; "
        "from pipeline.artifact.weights_file import weights_file_bytes; "
        "sys.stdout.buffer.write(weights_file_bytes(some_groups()))"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MALLOC_PERTURB_": "165", "PYTHONHASHSEED": "77"},
        capture_output=True,
        check=True,
    )
    assert other.stdout == data


def test_strided_arrays_are_written_by_value():
    array = np.arange(12, dtype="float32").reshape(3, 4)
    assert weights_file_bytes({"vars": [array.T]}) == weights_file_bytes({"vars": [array.T.copy()]})


def test_dtypes_that_keras_would_misread_are_refused():
    with pytest.raises(WeightsFileError, match=r"/vars/0: cannot store dtype \|S1"):
        weights_file_bytes({"vars": [np.array([b"x"])]})


def test_more_bytes_than_the_model_has_are_refused_before_reading():
    def bomb(file):
        shape, chunks = (1 << 20, 1 << 20), (1 << 10, 1 << 10)
        file.create_dataset("vars/0", shape, "uint8", chunks=chunks, compression="gzip")

    with pytest.raises(WeightsFileError, match="declares 1099511627776 bytes"):
        read_weights_file(write(bomb), max_bytes=LARGE)


def test_chunks_beyond_their_array_are_refused():
    def bomb(file):
        file.create_dataset("vars/0", (1,), "uint8", chunks=(1 << 30,), maxshape=(None,))

    with pytest.raises(WeightsFileError, match="chunks larger than itself"):
        read_weights_file(write(bomb), max_bytes=LARGE)


def hostile(kind, file):
    group = file.create_group("layers")
    match kind:
        case "soft link":
            group["vars"] = h5py.SoftLink("/layers")
        case "external link":
            group["vars"] = h5py.ExternalLink("/etc/passwd", "/")
        case "loop":
            group["again"] = group
        case "two names":
            group["vars/0"] = np.zeros(3)
            group["vars/1"] = group["vars/0"]
        case "external values":
            group.create_dataset("vars/0", (3,), "uint8", external=[("/etc/passwd", 0, 3)])
        case "virtual values":
            layout = h5py.VirtualLayout((3,), "uint8")
            layout[:] = h5py.VirtualSource("/etc/passwd", "x", (3,))
            group.create_virtual_dataset("vars/0", layout)
        case "a type":
            group["vars"] = np.dtype("float32")
        case "text":
            group["vars/0"] = "text"
        case "a gap":
            group["vars/1"] = np.zeros(3)
        case "nothing":
            group["vars/0"] = h5py.Empty("float32")


@pytest.mark.parametrize(
    "kind",
    [
        "soft link",
        "external link",
        "loop",
        "two names",
        "external values",
        "virtual values",
        "a type",
        "text",
        "a gap",
        "nothing",
    ],
)
def test_anything_but_numbered_arrays_is_refused(kind):
    with pytest.raises(WeightsFileError, match=r"^weights file: "):
        read_weights_file(write(lambda file: hostile(kind, file)), max_bytes=LARGE)


def test_damage_raises_nothing_but_our_error():
    groups = {"layers/dense/vars": [np.random.default_rng(0).integers(0, 4, (99, 99), "uint8")]}
    data = weights_file_bytes(groups)
    for cut in range(0, len(data), 211):
        with pytest.raises(WeightsFileError):
            read_weights_file(data[:cut], max_bytes=LARGE)
    rng = np.random.default_rng(3)
    for place in rng.integers(0, len(data), 200):
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.integers(8)
        # No crash, and no error of another kind; which flips remain unseen, digests find.
        with contextlib.suppress(WeightsFileError):
            read_weights_file(bytes(flipped), max_bytes=LARGE)
