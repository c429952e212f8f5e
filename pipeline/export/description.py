"""What an export is, or would be, for people: what would serve each matrix, what to know before.

Reading this needs neither JAX nor Keras: a driver prints what another process found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pipeline.export.code_formats import ExportFormat
from pipeline.export.kernels import ExportedTensor
from pipeline.export.manifest import ExportManifest

if TYPE_CHECKING:
    from pipeline.export.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ExportDescription:
    """What an export is, or would be.

    Attributes:
        dtype: of what is not quantized.
        config_from: where config.json comes from.
        tokenizer: whether there is one.
        notes: what a person should know before the export is served, a line each.
        tensors: every matrix, in the model's order.
    """

    format: ExportFormat
    dtype: str
    config_from: str
    tokenizer: bool
    notes: tuple[str, ...]
    tensors: tuple[ExportedTensor, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Describe a planned checkpoint."""
        config, tensors = checkpoint.config, checkpoint.report()
        notes: list[str] = []
        if config.made:
            notes.append(
                "config.json is the one that KerasHub writes, since the source is no Hugging Face "
                "folder, or is gone; name one of this model with --like for the published one"
            )
        if config.tokenizer:
            notes.append(
                "the tokenizer is the artifact's own, written for transformers: it splits texts as "
                "KerasHub does, and has no chat template"
            )
        elif not config.has_tokenizer:
            notes.append(
                "no tokenizer is exported, since there is none that can be written for "
                "transformers; copy the model's own there, or name its folder with --like"
            )
        if not checkpoint.generates:
            named = ", ".join(checkpoint.config_json()["architectures"]) or "the base model"
            notes.append(
                f"{named} is exported, without the head that its task may have: heads are not "
                "quantized, and KerasHub's converters have no place for them"
            )
        if checkpoint.format == "compressed-tensors" and any(
            not found.symmetric for found in checkpoint.formats.values()
        ):
            notes.append(
                "transformers 5.23 and 5.24 refuse zero points as compressed-tensors packs them; "
                "older ones and vLLM take them, and all take symmetric schemes"
            )
        if checkpoint.format != "dense":
            notes += _kernel_notes(tensors)
        return cls(
            format=checkpoint.format,
            dtype=str(checkpoint.dtype),
            config_from=config.folder.url,
            tokenizer=config.has_tokenizer,
            notes=tuple(notes),
            tensors=tensors,
        )

    @property
    def kernels(self) -> str:
        """vLLM's kernels with the number of matrices that each would take, in words."""
        found = Counter(row.kernel or "none" for row in self.tensors)
        return ", ".join(f"{name} ({number})" for name, number in found.items())

    def facts(self) -> dict[str, Any]:
        """Plain JSON values, without notes and tensors."""
        return {
            "format": self.format,
            "dtype": self.dtype,
            "config_from": self.config_from,
            "tokenizer": self.tokenizer,
        }


@dataclass(frozen=True, kw_only=True)
class MadeExport:
    """A finished export, and the URL of its folder."""

    url: str
    description: ExportDescription
    manifest: ExportManifest


def _kernel_notes(tensors: Sequence[ExportedTensor]) -> Iterator[str]:
    reasons = Counter(row.reason for row in tensors if row.reason)
    for reason, number in reasons.items():
        yield f"{number} of the checkpoint's matrices: {reason}"
