"""What a person asks to export, and where below a run it goes.

Reading this needs neither JAX nor Keras.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from pipeline.export.code_formats import ExportFormat
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.record import STRICT, StoredRecord

EXPORTS_PREFIX = "exports/"
"""The folder of a run below which its exports lie, each in a folder of its own."""

ExportDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ExportSettings(StoredRecord):
    """One export of a run.

    Attributes:
        dtype: of what is not quantized; None for the artifact's own.
        like_url: a Hugging Face folder of the model to take config and tokenizer from.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: ExportFormat = "compressed-tensors"
    dtype: ExportDtype | None = None
    like_url: str | None = None

    @property
    def folder(self) -> str:
        """Where it lies below the run, unless a person names another folder."""
        return f"{EXPORTS_PREFIX}{self.format}"

    @property
    def key(self) -> str:
        """Where a run keeps that it is wanted, so that `quantfleet resume` makes it too."""
        return f"{EXPORTS_PREFIX}{self.format}.json"


def wanted_exports(run: ObjectStore) -> tuple[ExportSettings, ...]:
    """The exports that a run was started or continued with.

    Raises:
        DamagedObjectError: one of the records cannot be read.
    """
    keys = (key for key in run.list(EXPORTS_PREFIX) if key.count("/") == 1)
    return tuple(ExportSettings.read(run, key) for key in keys if key.endswith(".json"))
