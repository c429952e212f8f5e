"""A run on a plain Keras model, one `.keras` file × one recipe: what decides it, what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.canonical import digest_of
from pipeline.recipe.recipe import Recipe
from pipeline.run.records import LayerRecord, Manifest
from quantizer.schemes import scheme_from_dict, scheme_to_dict

SUFFIX = ".keras"
MODEL_KEY = "model.keras"
_KIND = "keras model"


@dataclass(frozen=True, kw_only=True)
class PlainPlan:
    """Everything that decides a run's result, and what will become of each layer.

    Attributes:
        source_sha256, source_bytes: of the file.
        inputs_sha256: of each calibration array, as it is given to the model, by input.
        layers: with a scheme, or the reason why not.
        quantized_share: of the elements of all matrices, 0 to 1.
        unused_rules: patterns that decide no layer.
    """

    source_url: str
    source_sha256: str
    source_bytes: int
    model: str
    recipe: Recipe
    inputs_sha256: dict[str, str]
    machine: dict[str, str]
    versions: dict[str, str]
    layers: tuple[LayerRecord, ...]
    quantized_share: float
    unused_rules: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides the result."""
        return digest_of(self._deciding())

    def provenance(self, layers: tuple[LayerRecord, ...]) -> dict[str, Any]:
        """What a manifest says of the result, as plain JSON values.

        Args:
            layers: with the solver's accounts.
        """
        return {
            **self._deciding(),
            "kind": _KIND,
            "model": self.model,
            "source_url": self.source_url,
            "source_bytes": self.source_bytes,
            "quantized_share": self.quantized_share,
            "layers": [
                {
                    "path": layer.path,
                    "scheme": None if layer.scheme is None else scheme_to_dict(layer.scheme),
                    "account": layer.account,
                    "note": layer.note,
                }
                for layer in layers
            ],
        }

    def _deciding(self) -> dict[str, Any]:
        return {
            "source_sha256": self.source_sha256,
            "recipe": self.recipe.to_dict(),
            "inputs_sha256": self.inputs_sha256,
            "machine": self.machine,
            "versions": self.versions,
        }


def is_plain(manifest: Manifest) -> bool:
    """Whether a finished run's result is a plain Keras model."""
    return manifest.provenance.get("kind") == _KIND


def layer_records(manifest: Manifest) -> tuple[LayerRecord, ...]:
    """What became of each layer, from the manifest of a plain model.

    Raises:
        SchemeError: schemes that this version does not know.
    """
    return tuple(
        LayerRecord(
            path=values["path"],
            scheme=None if values["scheme"] is None else scheme_from_dict(values["scheme"]),
            account=values["account"],
            note=values["note"],
        )
        for values in manifest.provenance["layers"]
    )
