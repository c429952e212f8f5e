"""A stored file that a library may read as a local one, in few requests and none too many bytes."""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import dataclass

from pipeline.errors import PipelineError
from pipeline.source.preset import PresetFiles

_BLOCK_BYTES = 64 << 10
_NUM_BLOCKS = 64


@dataclass
class Meter:
    """Counts what is asked of storage."""

    bytes_read: int = 0

    def read(self, preset: PresetFiles, name: str, start: int, stop: int) -> bytes:
        data = preset.read(name, start, stop)
        self.bytes_read += len(data)
        return data


class RangedFile(io.RawIOBase):
    """Reads of data go to storage as they are; small ones, of metadata, come in kept blocks."""

    def __init__(self, preset: PresetFiles, name: str, meter: Meter) -> None:
        super().__init__()
        self._preset = preset
        self._name = name
        self._meter = meter
        self._size = preset.sizes[name]
        self._position = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self.failure: PipelineError | None = None
        """What went wrong in storage: HDF5 tells its caller only that a read failed."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._size)
        try:
            data = self._read(self._position, stop)
        except PipelineError as error:
            self.failure = error
            raise
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, start: int, stop: int) -> bytes:
        if stop - start >= _BLOCK_BYTES:
            return self._meter.read(self._preset, self._name, start, stop)
        first = start // _BLOCK_BYTES
        blocks = range(first, -(-stop // _BLOCK_BYTES))
        data = b"".join(self._block(index) for index in blocks)
        return data[start - first * _BLOCK_BYTES : stop - first * _BLOCK_BYTES]

    def _block(self, index: int) -> bytes:
        if index not in self._blocks:
            start = index * _BLOCK_BYTES
            stop = min(start + _BLOCK_BYTES, self._size)
            self._blocks[index] = self._meter.read(self._preset, self._name, start, stop)
            if len(self._blocks) > _NUM_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(index)
        return self._blocks[index]
