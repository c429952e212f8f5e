"""Read and write one HDF5 file of Keras weights; equal arrays give equal bytes.

Keras wants 2- and 3-bit codes in a byte each. HDF5's scale-offset filter stores their low bits
alone, several times faster than gzip, which takes up to 1.3 times the space. Float8 kernels are
float arrays of at most 255 distinct values, which gzip stores in about 8 bits each. Every HDF5
library reads both filters without being told.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import h5py
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import WeightsFileError

_LIBVER = ("v110", "v110")
"""File format: fixed, readable by every HDF5 since 1.10, and without time stamps."""

_PACKED_CODE_BITS = 3
_MIN_FILTERED_BYTES = 1 << 12
"""Below this a filter's bookkeeping costs more than it saves."""

_CHUNK_BYTES = 1 << 20
"""What HDF5 filters at once; its default chunk cache holds one of these."""

_STORED_KINDS = "fiu"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_SCALE_OFFSET = (h5py.h5z.FILTER_SCALEOFFSET,)
_GZIP = ((h5py.h5z.FILTER_DEFLATE,), (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE))


def weights_file_bytes(
    groups: Mapping[str, Sequence[NDArray[Any]]], *, compressed: Set[str] = frozenset()
) -> bytes:
    """Write arrays as a weights file; its bytes depend on nothing but the arguments.

    Args:
        groups: arrays by HDF5 group ("layers/dense/vars"), in the order in which Keras loads them.
        compressed: keys ("layers/dense/vars/0") of float arrays with few distinct values.

    Raises:
        WeightsFileError: a dtype that a weights file cannot hold.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=_LIBVER) as file:
        for name in sorted(groups):
            group = _make_group(file, name)
            for index, array in enumerate(groups[name]):
                filters = _float8_filters if f"{name}/{index}" in compressed else _code_filters
                _write(group, str(index), array, filters(array))
    return buffer.getvalue()


def read_weights_file(data: bytes, *, max_bytes: int) -> dict[str, list[NDArray[Any]]]:
    """Read a weights file without trusting anything in it.

    Args:
        max_bytes: memory that all arrays together may take.

    Returns:
        Arrays by group, groups in sorted order.

    Raises:
        WeightsFileError: damaged, larger than allowed, or with anything in it but groups of arrays
            numbered from 0: links, other types, a group that contains itself, unknown filters.
    """
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            found = dict(_walk(file))
            total = sum(math.prod(item.shape) * item.dtype.itemsize for item in found.values())
            if total > max_bytes:
                raise WeightsFileError(
                    f"weights file declares {total} bytes of arrays where {max_bytes} are "
                    "expected; it is not of this model"
                )
            return _arrays(found)
    except WeightsFileError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise WeightsFileError(
            f"weights file of {len(data)} bytes is damaged ({reason}); it has to be made again"
        ) from None


def stored_bytes(data: bytes) -> dict[str, int]:
    """What the arrays of each group take in a weights file; all else in it is HDF5's own."""
    sizes: dict[str, int] = {}
    with h5py.File(io.BytesIO(data), "r") as file:
        for path, dataset in _walk(file):
            group = path.rpartition("/")[0]
            sizes[group] = sizes.get(group, 0) + int(dataset.id.get_storage_size())
    return sizes


def _make_group(file: h5py.File, name: str) -> h5py.Group:
    group = file
    # One level at a time: HDF5 stores the time in intermediate groups that it creates itself.
    for part in name.split("/"):
        group = group[part] if part in group else group.create_group(part)
    return group


def _write(group: h5py.Group, key: str, array: NDArray[Any], filters: Mapping[str, Any]) -> None:
    array = np.asarray(array)
    if array.dtype != _BFLOAT16 and array.dtype.kind not in _STORED_KINDS:
        raise WeightsFileError(
            f"{group.name}/{key}: cannot store dtype {array.dtype} in a weights file"
        )
    dataset = group.create_dataset(key, data=array, **filters)
    if array.dtype == _BFLOAT16:
        # HDF5 has no such type and stores two opaque bytes; Keras marks them in this way.
        dataset.attrs["dtype"] = "bfloat16"


def _code_filters(array: NDArray[Any]) -> dict[str, Any]:
    if array.dtype != np.uint8 or array.nbytes < _MIN_FILTERED_BYTES:
        return {}
    bits = max(1, int(array.max()).bit_length())
    return {"scaleoffset": bits, "chunks": _chunks(array)} if bits <= _PACKED_CODE_BITS else {}


def _float8_filters(array: NDArray[Any]) -> dict[str, Any]:
    """gzip at its fastest level: higher ones take 2 to 20 times as long and save 2 to 5%."""
    if array.nbytes < _MIN_FILTERED_BYTES:
        return {}
    # In float32, a scale that is no power of two fills all 24 bits of every value: then whole
    # values repeat, and taking them apart by bytes hides it (15.5 bits a weight; else 11.2).
    apart = array.dtype.itemsize == 2 or bool(np.all(array == array.astype(_BFLOAT16)))
    return {
        "shuffle": apart,
        "compression": "gzip",
        "compression_opts": 1 if apart else 3,
        "chunks": _chunks(array),
    }


def _chunks(array: NDArray[Any]) -> tuple[int, ...]:
    # Chunks of equal size: the last one is stored whole, however little is in it.
    num_chunks = min(array.shape[0], math.ceil(array.nbytes / _CHUNK_BYTES))
    return (math.ceil(array.shape[0] / num_chunks), *array.shape[1:])


def _walk(file: h5py.File) -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset with its path, in sorted order."""
    seen: set[Any] = set()
    pending = [("", file)]
    while pending:
        path, group = pending.pop()
        for name in sorted(group, reverse=True):
            child_path = f"{path}/{name}" if path else name
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise _refused(child_path, f"is a {type(link).__name__}")
            child = group[name]
            address = h5py.h5o.get_info(child.id).addr
            if address in seen:
                raise _refused(child_path, "has another name as well")
            seen.add(address)
            if isinstance(child, h5py.Group):
                pending.append((child_path, child))
            elif isinstance(child, h5py.Dataset):
                _check_dataset(child_path, child)
                yield child_path, child
            else:
                raise _refused(child_path, "is not an array")


def _check_dataset(path: str, dataset: h5py.Dataset) -> None:
    bfloat16 = dataset.attrs.get("dtype") == "bfloat16" and dataset.dtype.itemsize == 2
    if dataset.is_virtual or dataset.external:
        raise _refused(path, "keeps its values elsewhere")
    if dataset.shape is None or not (dataset.dtype.kind in _STORED_KINDS or bfloat16):
        raise _refused(path, f"has dtype {dataset.dtype}")
    # A chunk is unpacked whole, however little of it belongs to the array.
    if dataset.chunks and math.prod(dataset.chunks) > max(dataset.size, 1):
        raise _refused(path, "has chunks larger than itself")


def _refused(path: str, problem: str) -> WeightsFileError:
    return WeightsFileError(f"weights file: {path} {problem}; refused")


def _arrays(datasets: Mapping[str, h5py.Dataset]) -> dict[str, list[NDArray[Any]]]:
    groups: dict[str, dict[str, h5py.Dataset]] = {}
    for path, dataset in datasets.items():
        group, _, key = path.rpartition("/")
        groups.setdefault(group, {})[key] = dataset
    for group, found in sorted(groups.items()):
        if set(found) != {str(index) for index in range(len(found))}:
            raise WeightsFileError(
                f"weights file: arrays of {group} are not numbered from 0 ({sorted(found)[:9]})"
            )
    return {
        group: [_read(f"{group}/{index}", found[str(index)]) for index in range(len(found))]
        for group, found in sorted(groups.items())
    }


def _read(path: str, dataset: h5py.Dataset) -> NDArray[Any]:
    if dataset.chunks and not _unpacks_to_its_size(dataset):
        raise _refused(
            path, "has a filter that is unknown, or unpacks to more than the array holds"
        )
    value = np.asarray(dataset[()])
    return value.view(_BFLOAT16) if dataset.attrs.get("dtype") == "bfloat16" else value


def _unpacks_to_its_size(dataset: h5py.Dataset) -> bool:
    """Whether HDF5's filters give a chunk's bytes and no more: gzip itself has no limit."""
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(i) for i in range(properties.get_nfilters())]
    codes = tuple(code for code, *_ in filters)
    num_bytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if codes in _GZIP:
        skipped = 1 << codes.index(h5py.h5z.FILTER_DEFLATE)
        return all(
            _inflates_to(num_bytes, dataset, index, skipped)
            for index in range(dataset.id.get_num_chunks())
        )
    if codes == _SCALE_OFFSET:
        _, _, (_, _, unpacked_values, _, value_bytes, *_), _ = filters[0]
        return bool(unpacked_values * value_bytes == num_bytes)
    return not codes


def _inflates_to(num_bytes: int, dataset: h5py.Dataset, index: int, skipped: int) -> bool:
    chunk = dataset.id.get_chunk_info(index)
    if chunk.filter_mask == skipped:  # HDF5 leaves a chunk alone that gzip would not shrink
        return bool(chunk.size == num_bytes)
    _, stored = dataset.id.read_direct_chunk(chunk.chunk_offset)
    inflated = zlib.decompressobj().decompress(stored, num_bytes + 1)
    return chunk.filter_mask == 0 and len(inflated) == num_bytes
