"""Plan a checkpoint for other runtimes: which tensors come from which of an artifact's parts.

Everything that cannot be exported is refused here, before any weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact.codes_file import read_codes_file
from pipeline.artifact.parts import Part, cut_parts, decode_part
from pipeline.errors import ExportError
from pipeline.export.code_formats import CodeFormat, ExportFormat
from pipeline.export.codes import Matrix
from pipeline.export.experts import expert_kernel, expert_matrix
from pipeline.export.folding import Divisor, divisors, folds_of
from pipeline.export.formats import (
    Tensors,
    check_format,
    compressed_tensors,
    gptq,
    quantization_config,
)
from pipeline.export.kernels import ExportedTensor, ServingKernel, serving_kernel
from pipeline.export.module_formats import joined_kernels, module_formats
from pipeline.export.tensor_names import tensor_names
from pipeline.fold import Fold
from pipeline.model.blocks import find_blocks
from pipeline.model.checkpoint_config import CheckpointConfig, checkpoint_config, config_json
from pipeline.model.preset import PresetFiles
from pipeline.model.skeleton import build_skeleton
from pipeline.model.tensor_places import TensorPlace, TensorPlaces, find_places
from pipeline.plan import Plan
from quantizer.expert_codes import ExpertCodes
from quantizer.keras_format.variables import decode_embedding, decode_kernel
from quantizer.schemes import Int4Scheme, Int8Scheme, Scheme

_TABLES = ("embeddings", "reverse_embeddings")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A planned checkpoint.

    Attributes:
        dtype: of everything that is not quantized, and of scales.
        parts: of the artifact; `in_float` are the same parts of the float model.
        schemes: by layer path.
        names: of each of the places' tensors, as transformers calls it.
        formats: of each quantized module, by its name.
        folds: what takes up the input scales of a foldable awq, by layer path; none where the
            layers themselves are dequantized.
    """

    config: CheckpointConfig
    format: ExportFormat
    dtype: np.dtype[Any]
    generates: bool
    parts: tuple[Part, ...]
    in_float: tuple[Part, ...]
    places: TensorPlaces
    schemes: Mapping[str, Scheme]
    names: Mapping[str, str]
    formats: Mapping[str, CodeFormat]
    folds: Mapping[str, Fold] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> tuple[tuple[TensorPlace, ...], ...]:
        """The tensors that come from each part."""
        part_of = {
            str(stored.variable.path): part.number
            for part in self.in_float
            for stored in part.variables
        }
        found: list[list[TensorPlace]] = [[] for _ in self.parts]
        for place in self.places.tensors.values():
            numbers = {part_of[path] for path in place.variables}
            if not numbers:
                numbers = {0}  # zeros, for a table that the model has no variable of
            if len(numbers) > 1:
                raise ExportError(
                    f"{place.name} holds variables of several blocks ({', '.join(place.variables)})"
                    "; models of this family cannot be exported"
                )
            found[numbers.pop()].append(place)
        return tuple(map(tuple, found))

    def file(self, number: int) -> str:
        """Name of a part's file, as transformers names shards."""
        return f"model-{number + 1:05d}-of-{len(self.parts):05d}.safetensors"

    def encode(self, number: int, data: bytes, codes: bytes | None = None) -> Tensors:
        """The checkpoint's tensors of one part.

        Args:
            data: the part's file in the artifact.
            codes: the part's file of codes, if it has one.

        Raises:
            ExportError: values that the wanted dtype cannot hold, or that are off their grid.
        """
        banks = {} if codes is None else read_codes_file(codes)
        values = _Values(self, number, decode_part(self.parts[number], data), banks)
        tensors: Tensors = {}
        for place in self.tensors[number]:
            tensors |= values.tensors(place)
        values.check_constants()
        return tensors

    def config_json(self) -> dict[str, Any]:
        """The content of config.json."""
        quantization = quantization_config(self.format, self.formats, self._modules_in_float)
        return config_json(
            self.config,
            dtype=str(self.dtype),
            generates=self.generates,
            quantization=quantization,
        )

    @property
    def _modules_in_float(self) -> tuple[str, ...]:
        matrices = (place for place in self.places.tensors.values() if place.input_axis is not None)
        named = [self.names[place.name].rpartition(".")[0] for place in matrices]
        head = ["lm_head"] if self.generates else []
        return tuple(module for module in [*named, *head] if module not in self.formats)

    def _layer(self, path: str) -> str:
        """What has the scheme of a variable: its layer, or a bank of experts itself."""
        return path if path in self.schemes else path.rpartition("/")[0]

    def report(self) -> tuple[ExportedTensor, ...]:
        """Every matrix, in the model's order."""
        rows = []
        for place in (place for of_part in self.tensors for place in of_part):
            layers = tuple(dict.fromkeys(map(self._layer, place.variables)))
            quantized = [self.schemes[layer] for layer in layers if layer in self.schemes]
            if place.input_axis is None and not quantized:
                continue
            owned = {path.rpartition("/")[2] for path in place.variables}
            if place.input_axis is None and owned.isdisjoint(_TABLES):
                continue
            module = self.names[place.name].rpartition(".")[0]
            found = self.formats.get(module)
            kernel = ServingKernel(name="dense")
            if found is not None and place.name in self.places.experts:
                kernel = expert_kernel(found)
            elif found is not None:
                kernel = serving_kernel(module, self.format, self.formats)
            elif quantized:
                kernel = ServingKernel(name="dense", reason="dequantized: no memory is saved")
            rows.append(
                ExportedTensor(
                    module=module,
                    layers=layers,
                    scheme=quantized[0].policy if quantized else "",
                    stored=str(self.dtype) if found is None else found.described,
                    kernel=kernel.name,
                    reason=kernel.reason,
                )
            )
        return tuple(rows)


class _Values:
    """One part's values, and what becomes of them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        number: int,
        values: Mapping[str, NDArray[Any]],
        banks: Mapping[str, ExpertCodes],
    ) -> None:
        self._checkpoint = checkpoint
        self._banks = banks
        self._values = values
        self._stored = {str(s.variable.path): s for s in checkpoint.in_float[number].variables}
        self._own: dict[str, dict[str, NDArray[Any]]] = {}
        for stored in checkpoint.parts[number].variables:
            self._own.setdefault(stored.layer_path, {})[stored.name] = values[stored.name_path]
        self._divisors: Mapping[str, Divisor] = {}
        if checkpoint.format != "dense":
            layouts = checkpoint.places.layouts
            self._divisors = divisors(checkpoint.folds, self._own, checkpoint.schemes, layouts)

    def tensors(self, place: TensorPlace) -> Tensors:
        """A place's tensors: codes and scales, or one in float."""
        checkpoint = self._checkpoint
        name = checkpoint.names[place.name]
        module = name.rpartition(".")[0]
        if place.input_axis is not None and module in checkpoint.formats:
            made = self._matrix(place)
            write = gptq if checkpoint.format == "gptq" else compressed_tensors
            return write(module, made, checkpoint.dtype)
        values = {path: self._folded(path) for path in place.variables}
        dtypes = [value.dtype for value in values.values()] or [checkpoint.dtype]
        # Zeros where the model reads nothing.
        tensor = np.zeros(place.shape, np.result_type(*dtypes))
        for path, value in values.items():
            if place.name in checkpoint.places.experts:
                tensor[...] = checkpoint.places.experts[place.name].of(value)
            else:
                checkpoint.places.scatter(path, value, tensor)
        with np.errstate(over="ignore"):  # reported below
            cast = tensor.astype(checkpoint.dtype)
        if not np.isfinite(cast.astype(np.float32)).all():
            raise ExportError(
                f"{name}: values are too large for {checkpoint.dtype}; use --dtype bfloat16"
            )
        return {name: cast}

    def check_constants(self) -> None:
        """Check that what KerasHub's converter fills with constants still holds them."""
        for path in self._stored:
            conversion = self._checkpoint.places.conversions.get(path)
            if conversion is None or conversion.constant is None:
                continue
            if not np.array_equal(self._dense(path), conversion.constant):
                raise ExportError(
                    f"{path}: a Hugging Face checkpoint has no place for it, and it is not the "
                    "constant that KerasHub's converter would put there; the model cannot be "
                    "exported"
                )

    def _matrix(self, place: TensorPlace) -> Matrix:
        checkpoint = self._checkpoint
        expert = checkpoint.places.experts.get(place.name)
        if expert is not None:
            module = checkpoint.names[place.name].rpartition(".")[0]
            return expert_matrix(self._banks[expert.variable], expert, checkpoint.formats[module])
        return joined_kernels(
            checkpoint.places, place, checkpoint.schemes, self._own, self._divisors
        )

    def _folded(self, path: str) -> NDArray[Any]:
        """A variable's value in float, with the input scales that it takes up."""
        value, divisor = self._dense(path), self._divisors.get(path)
        return value if divisor is None else divisor.divided(value)

    def _dense(self, path: str) -> NDArray[Any]:
        """A variable's value in float, as the float model has it."""
        stored = self._stored[path]
        scheme = self._checkpoint.schemes.get(stored.layer_path)
        own = self._own[stored.layer_path]
        if scheme is not None and stored.name == "kernel":
            return decode_kernel(own, self._checkpoint.places.layouts[path], scheme)
        if scheme is not None and stored.name in _TABLES:
            assert isinstance(scheme, Int8Scheme | Int4Scheme)
            reverse = stored.name == "reverse_embeddings"
            length = stored.shape[0 if reverse else 1]
            return decode_embedding(own, scheme, length, reverse=reverse)
        return self._values[stored.name_path]


def plan_checkpoint(
    plan: Plan,
    artifact: PresetFiles,
    as_format: ExportFormat,
    *,
    dtype: str | None = None,
    like_url: str | None = None,
) -> Checkpoint:
    """Decide everything about a checkpoint; no weights are read.

    Args:
        plan: of the run that made the artifact.
        dtype: of what is not quantized; None for the artifact's own.
        like_url: a Hugging Face folder of the model, to take config and tokenizer from.

    Raises:
        ExportError: a model or a layer that cannot be exported in this format.
        SourceError: an artifact or folder that cannot be used.
    """
    layers = (layer for of_part in plan.parts for layer in of_part.layers)
    schemes = {layer.path: layer.scheme for layer in layers if layer.scheme is not None}
    made = lay_out(artifact, schemes, plan.source_url, as_format, dtype=dtype, like_url=like_url)
    return made if as_format == "dense" else replace(made, folds=folds_of(plan, made.places))


def lay_out(
    artifact: PresetFiles,
    schemes: Mapping[str, Scheme],
    source_url: str,
    as_format: ExportFormat,
    *,
    dtype: str | None = None,
    like_url: str | None = None,
) -> Checkpoint:
    """As `plan_checkpoint`, of an artifact that need not be made yet: its JSON is enough.

    Args:
        schemes: of the quantized layers, by path.
        source_url: of what the artifact is made from.
    """
    skeleton = build_skeleton(artifact)
    config = checkpoint_config(artifact, skeleton, source_url, like_url)
    parts = cut_parts(skeleton.stored, [block.layer for block in find_blocks(skeleton).blocks])
    plain = build_skeleton(artifact, "float32")
    in_float = cut_parts(plain.stored, [block.layer for block in find_blocks(plain).blocks])
    places = find_places(config.folder, plain)
    for part in in_float:
        for stored in part.variables:
            if str(stored.variable.path) not in places.variables:
                raise ExportError(
                    f"{stored.variable.path}: KerasHub's converter gives it no value, so a Hugging "
                    "Face checkpoint has no place for it; the model cannot be exported"
                )
    first = next(s for s in skeleton.stored if s.layer_path not in schemes)
    checkpoint = Checkpoint(
        config=config,
        format=as_format,
        dtype=np.dtype(dtype or first.dtype),
        generates=skeleton.predicts_tokens,
        parts=parts,
        in_float=in_float,
        places=places,
        schemes=schemes,
        names=tensor_names(config, places, generates=skeleton.predicts_tokens),
        formats={},
    )
    if as_format != "dense":
        checkpoint = replace(checkpoint, formats=module_formats(checkpoint))
        check_format(as_format, checkpoint.formats)
    return checkpoint
