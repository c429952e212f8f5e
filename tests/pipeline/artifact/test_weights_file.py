"""A weights file holds exactly its arrays, in few bytes, the same bytes every time.

Keras and JAX are imported where they are needed: a test imports this module in a new process.
"""

import contextlib
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import h5py
import ml_dtypes
import numpy as np
import pytest

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


def float8_kernel(power_of_two, dtype, shape=(512, 1000)):
    """Gaussian weights on the E4M3 grid, as float8 layers hold them."""
    from quantizer.rtn import float8_scale, round_to_float8

    weight = np.random.default_rng(0).normal(scale=0.02, size=shape).astype("float32")
    scale = float8_scale(float(np.abs(weight).max()), power_of_two=power_of_two)
    return round_to_float8(weight, scale).astype(dtype)


def test_keras_reads_the_same():
    from keras.src.saving.saving_lib import H5IOStore

    groups = some_groups() | {
        "layers/float8/vars": [float8_kernel(True, ml_dtypes.bfloat16), float8_kernel(False, "f4")]
    }
    compressed = {"layers/float8/vars/0", "layers/float8/vars/1"}
    store = H5IOStore(io.BytesIO(weights_file_bytes(groups, compressed=compressed)))
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


@pytest.mark.parametrize(
    ("power_of_two", "dtype", "bits"),
    [
        (True, "float32", 8.4),
        (True, "float16", 8.4),
        (True, ml_dtypes.bfloat16, 8.3),
        (False, ml_dtypes.bfloat16, 8.4),
        (False, "float32", 11.5),
    ],
)
def test_float8_kernels_take_about_their_bits(power_of_two, dtype, bits):
    kernel = float8_kernel(power_of_two, dtype)
    data = weights_file_bytes({"vars": [kernel, kernel[0]]}, compressed={"vars/0", "vars/1"})
    assert 8 * len(data) / kernel.size < bits
    found, short = read_weights_file(data, max_bytes=2 * kernel.nbytes)["vars"]
    assert (found.dtype, found.tobytes()) == (kernel.dtype, kernel.tobytes())
    assert short.tobytes() == kernel[0].tobytes()


def test_what_gzip_cannot_shrink_is_stored_and_read_as_it_is():
    noise = np.random.default_rng(0).integers(0, 1 << 32, (256, 1024), "uint32").view("float32")
    noise = np.nan_to_num(noise)
    data = weights_file_bytes({"vars": [noise]}, compressed={"vars/0"})
    [read] = read_weights_file(data, max_bytes=noise.nbytes)["vars"]
    assert read.tobytes() == noise.tobytes()


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


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_chunk_that_inflates_beyond_its_array_is_refused_before_it_does(shuffle):
    def bomb(file):
        options = {"chunks": (64, 64), "compression": "gzip", "shuffle": shuffle}
        dataset = file.create_dataset("vars/0", (64, 64), "float32", **options)
        dataset.id.write_direct_chunk((0, 0), zlib.compress(bytes(1 << 25)))

    data = write(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsFileError, match=r"vars/0 has a filter that .* unpacks to more"):
            read_weights_file(data, max_bytes=LARGE)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_packed_codes_that_claim_more_than_their_array_are_refused():
    def packed(file):
        codes = np.arange(4, dtype="uint8").repeat(1024)
        file.create_dataset("vars/0", data=codes, chunks=codes.shape, scaleoffset=2)

    # What the filter is told: scale an integer, keep 2 bits, 4096 values of class 0 and 1 byte.
    options, claim = struct.pack("<5I", 2, 2, 4096, 0, 1), struct.pack("<5I", 2, 2, 1 << 30, 0, 1)
    data = write(packed)
    assert read_weights_file(data, max_bytes=4096)
    assert data.count(options) == 1
    with pytest.raises(WeightsFileError, match="unpacks to more"):
        read_weights_file(data.replace(options, claim), max_bytes=LARGE)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzf"},
        {"fletcher32": True},
        {"compression": "gzip", "fletcher32": True},
        {"shuffle": True},
    ],
    ids=str,
)
def test_filters_that_we_never_write_are_refused(options):
    def filtered(file):
        file.create_dataset("vars/0", data=np.zeros((64, 64), "float32"), **options)

    with pytest.raises(WeightsFileError, match="vars/0 has a filter that is unknown"):
        read_weights_file(write(filtered), max_bytes=LARGE)


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
    codes = np.random.default_rng(0).integers(0, 4, (99, 99), "uint8")
    groups = {"layers/dense/vars": [codes, float8_kernel(False, ml_dtypes.bfloat16, (50, 60))]}
    data = weights_file_bytes(groups, compressed={"layers/dense/vars/1"})
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
