"""One file of sharded weights: HDF5 as Keras reads it, and the same bytes for the same arrays.

Keras wants 2- and 3-bit codes as a byte each. In the file HDF5's scale-offset filter stores their
low bits only (a quarter, three eighths of a byte), without loss; every HDF5 library since 1.8 has
it and undoes it by itself. It writes random codes several times faster than gzip, which needs up
to 1.3 times the space.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import WeightsFileError

_LIBVER = ("v110", "v110")
"""File format: fixed, readable by every HDF5 since 1.10, and without time stamps."""

_PACKED_CODE_BITS = 3
_MIN_PACKED_BYTES = 1 << 12
"""Below this a filter's bookkeeping costs more than it saves."""

_CHUNK_BYTES = 1 << 20
"""What HDF5 packs at once; its default chunk cache holds one of these."""

_STORED_KINDS = "fiu"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def weights_file_bytes(groups: Mapping[str, Sequence[NDArray[Any]]]) -> bytes:
    """Write arrays as a weights file; the bytes depend on the arrays and the groups' names only.

    Args:
        groups: arrays by HDF5 group ("layers/dense/vars"), in the order in which Keras loads them.

    Raises:
        WeightsFileError: a dtype that has no place in a weights file.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=_LIBVER) as file:
        for name in sorted(groups):
            group = _make_group(file, name)
            for index, array in enumerate(groups[name]):
                _write(group, str(index), array)
    return buffer.getvalue()


def read_weights_file(data: bytes, *, max_bytes: int) -> dict[str, list[NDArray[Any]]]:
    """Read a weights file back, trusting nothing in it.

    Args:
        data: the file.
        max_bytes: what its arrays may take in memory, all together; the layout's sum will do.

    Returns:
        Arrays by group, groups in sorted order.

    Raises:
        WeightsFileError: damaged, larger than allowed, or with anything in it but groups of arrays
            numbered from 0: links, other types, a group that contains itself.
    """
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            found = dict(_walk(file))
            total = sum(_declared_bytes(dataset) for dataset in found.values())
            if total > max_bytes:
                raise WeightsFileError(
                    f"weights file declares {total} bytes of arrays where {max_bytes} are "
                    "expected; it is not of this model"
                )
            return _arrays(found)
    except WeightsFileError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise WeightsFileError(
            f"weights file of {len(data)} bytes is damaged ({reason}); it has to be made again"
        ) from None


def _make_group(file: h5py.File, name: str) -> h5py.Group:
    group = file
    # Step by step: groups that HDF5 makes on the way carry the time.
    for part in name.split("/"):
        group = group[part] if part in group else group.create_group(part)
    return group


def _write(group: h5py.Group, key: str, array: NDArray[Any]) -> None:
    array = np.asarray(array)
    if array.dtype == _BFLOAT16:
        # As Keras marks it: HDF5 has no such type, and keeps the two bytes as they are.
        group.create_dataset(key, data=array).attrs["dtype"] = "bfloat16"
        return
    if array.dtype.kind not in _STORED_KINDS:
        raise WeightsFileError(
            f"{group.name}/{key}: cannot store dtype {array.dtype} in a weights file"
        )
    group.create_dataset(key, data=array, **_filters(array))


def _filters(array: NDArray[Any]) -> dict[str, Any]:
    if array.dtype != np.uint8 or array.nbytes < _MIN_PACKED_BYTES:
        return {}
    bits = max(1, int(array.max()).bit_length())
    if bits > _PACKED_CODE_BITS:
        return {}
    # Chunks of equal size: the last one is stored whole, however little is in it.
    num_chunks = min(array.shape[0], math.ceil(array.nbytes / _CHUNK_BYTES))
    num_rows = math.ceil(array.shape[0] / num_chunks)
    return {"scaleoffset": bits, "chunks": (num_rows, *array.shape[1:])}


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
                raise WeightsFileError(
                    f"weights file: {child_path} is a {type(link).__name__}; refused"
                )
            child = group[name]
            address = h5py.h5o.get_info(child.id).addr
            if address in seen:
                raise WeightsFileError(
                    f"weights file: {child_path} is there under another name; refused"
                )
            seen.add(address)
            if isinstance(child, h5py.Group):
                pending.append((child_path, child))
            elif isinstance(child, h5py.Dataset):
                _check_dataset(child_path, child)
                yield child_path, child
            else:
                raise WeightsFileError(f"weights file: {child_path} is no array; refused")


def _check_dataset(path: str, dataset: h5py.Dataset) -> None:
    bfloat16 = dataset.attrs.get("dtype") == "bfloat16" and dataset.dtype.itemsize == 2
    if dataset.is_virtual or dataset.external:
        raise WeightsFileError(f"weights file: {path} keeps its values elsewhere; refused")
    if dataset.shape is None or not (dataset.dtype.kind in _STORED_KINDS or bfloat16):
        raise WeightsFileError(f"weights file: {path} has dtype {dataset.dtype}; refused")
    # A chunk is unpacked whole, however little of it belongs to the array.
    if dataset.chunks and math.prod(dataset.chunks) > max(dataset.size, 1):
        raise WeightsFileError(f"weights file: {path} has chunks larger than itself; refused")


def _declared_bytes(dataset: h5py.Dataset) -> int:
    return int(math.prod(dataset.shape) * dataset.dtype.itemsize)


def _arrays(datasets: Mapping[str, h5py.Dataset]) -> dict[str, list[NDArray[Any]]]:
    keys: dict[str, set[str]] = {}
    for path in datasets:
        group, _, key = path.rpartition("/")
        keys.setdefault(group, set()).add(key)
    for group, found in sorted(keys.items()):
        if found != {str(index) for index in range(len(found))}:
            raise WeightsFileError(
                f"weights file: arrays of {group} are not numbered from 0 on ({sorted(found)[:9]})"
            )
    return {
        group: [_read(datasets[f"{group}/{index}"]) for index in range(len(keys[group]))]
        for group in sorted(keys)
    }


def _read(dataset: h5py.Dataset) -> NDArray[Any]:
    value = np.asarray(dataset[()])
    return value.view(_BFLOAT16) if dataset.attrs.get("dtype") == "bfloat16" else value
