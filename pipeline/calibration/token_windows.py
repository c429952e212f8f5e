"""Token windows as they are stored: under the digest of their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from pipeline.errors import CalibrationTextError

_Int32 = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenWindows:
    """Calibration's input; equal windows have equal bytes, and so equal digests."""

    tokens: _Int32
    """[num_samples, sequence_length]"""
    lengths: _Int32
    """[num_samples]: tokens of each window that are text; the rest is padding."""
    fingerprint: str
    """SHA-256 of the documents that were read to make the windows, in their order."""
    num_documents: int
    """How many those were."""

    def __post_init__(self) -> None:
        fits = self.tokens.ndim == 2 and self.lengths.shape == self.tokens.shape[:1]
        if not fits or {self.tokens.dtype, self.lengths.dtype} != {np.dtype(np.int32)}:
            raise CalibrationTextError(
                "token windows are int32 tokens [num_samples, sequence_length] and lengths "
                f"[num_samples], not {self.tokens.dtype} {list(self.tokens.shape)} and "
                f"{self.lengths.dtype} {list(self.lengths.shape)}; make them again"
            )

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[num_samples, sequence_length]: True where a token is text."""
        return np.arange(self.tokens.shape[1])[None, :] < self.lengths[:, None]

    def to_bytes(self) -> bytes:
        """A safetensors file without metadata: whose maps have no fixed order."""
        return safetensors.numpy.save(
            {
                "fingerprint": np.frombuffer(bytes.fromhex(self.fingerprint), np.uint8),
                "lengths": self.lengths,
                "num_documents": np.array([self.num_documents], np.int64),
                "tokens": self.tokens,
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> TokenWindows:
        """The inverse of `to_bytes`.

        Raises:
            CalibrationTextError: damaged, or something else.
        """
        try:
            found = safetensors.numpy.load(content)
            windows = cls(
                tokens=found["tokens"],
                lengths=found["lengths"],
                fingerprint=found["fingerprint"].tobytes().hex(),
                num_documents=int(found["num_documents"][0]),
            )
        except (safetensors.SafetensorError, KeyError, IndexError) as error:
            raise CalibrationTextError(
                f"token windows: damaged ({error}); delete the file, so that it is made again"
            ) from error
        if windows.to_bytes() != content:
            raise CalibrationTextError(
                "token windows: not as they were written; delete the file, so that it is made again"
            )
        return windows

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `to_bytes()`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def key(self) -> str:
        """Where the windows are stored, by their content."""
        return f"tokens/{self.digest}.safetensors"
