"""Where a backbone's variables lie in a Hugging Face checkpoint: KerasHub's converter, inverted.

The converter runs on a skeleton and names a tensor and a hook for each variable. A hook that is fed
the numbers 0, 1, 2, … instead of weights shows where each element of the tensor lands. So no
architecture is named here; what a converter computes, rather than moves, is refused. Only two ways
of encoders to compute are known: leaving out a table's first rows, and adding a row for the kind of
text; both are undone by zeros.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import keras
import numpy as np
from keras_hub.src.utils.transformers.safetensor_utils import SafetensorLoader
from numpy.typing import NDArray

from pipeline.errors import ExportError, SourceError
from pipeline.model.conversion_recording import assigning
from pipeline.model.expert_tensors import (
    ExpertTensor,
    expert_tensors,
    is_of_one_expert,
    recorded_tensor,
)
from pipeline.model.huggingface import Conversion, Hook, converted_value, find_converter
from pipeline.model.preset import PresetFiles, keras_errors
from pipeline.model.recorded_tensors import Step
from pipeline.model.skeleton import Skeleton
from quantizer.keras_format.kernel_layout import KernelLayout
from quantizer.keras_format.layers import kernel_layout
from quantizer.keras_format.model_layers import WITH_KERNEL, layer_name

Index = NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """One tensor of a checkpoint.

    Attributes:
        shape: as transformers stores it.
        variables: paths of those that it holds; several where the checkpoint fuses layers, none
            where it needs a table of zeros.
        input_axis: of a matrix that layers multiply with: 1 for [out_features, in_features], 0 for
            its transpose (GPT-2's Conv1D); None for other tensors.
    """

    name: str
    shape: tuple[int, ...]
    variables: tuple[str, ...]
    input_axis: int | None

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class TensorPlaces:
    """The tensors of a checkpoint of one backbone.

    Attributes:
        skeleton: in float, used for nothing else: the converter may assign to it.
        conversions: by variable path.
        zeros: shapes of tensors that transformers adds and KerasHub has no variable for, by name.
        experts: tensors of single experts, whose variables have no conversion, by name.
    """

    skeleton: Skeleton
    conversions: Mapping[str, Conversion]
    zeros: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts: Mapping[str, ExpertTensor] = field(default_factory=dict)
    _known: dict[Hashable, tuple[tuple[int, ...], int | None]] = field(
        default_factory=dict, repr=False
    )

    @cached_property
    def layouts(self) -> Mapping[str, KernelLayout]:
        """The layout of each kernel, by variable path."""
        return {
            f"{layer_name(layer)}/kernel": kernel_layout(layer)
            for layer in self.skeleton.backbone_layers
            if type(layer) in WITH_KERNEL
        }

    @cached_property
    def tensors(self) -> Mapping[str, TensorPlace]:
        """Every tensor by its name, in the order in which the converter asks for them.

        Raises:
            ExportError: a tensor that the converter does not merely move.
        """
        users: dict[str, list[str]] = {}
        for path, conversion in self.conversions.items():
            if conversion.constant is None:
                users.setdefault(conversion.tensor, []).append(path)
        found = {name: self._place(name, tuple(paths)) for name, paths in users.items()}
        for name, shape in self.zeros.items():
            found[name] = TensorPlace(name=name, shape=shape, variables=(), input_axis=None)
        for name, one in self.experts.items():
            paths = (one.variable,)
            found[name] = TensorPlace(name=name, shape=one.shape, variables=paths, input_axis=1)
        return found

    @cached_property
    def variables(self) -> frozenset[str]:
        """Paths of all variables that have a place."""
        return frozenset([*self.conversions, *(one.variable for one in self.experts.values())])

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each variable of the backbone."""
        return {
            str(variable.path): tuple(int(size) for size in variable.shape)
            for variable in self.skeleton.backbone.variables
        }

    def signature(self, name: str) -> Hashable:
        """Equal for tensors that hold variables of the same shapes in the same way."""
        place = self.tensors[name]
        users = (
            (self.shapes[path], _hook_key(self.conversions[path].hook)) for path in place.variables
        )
        return place.shape, place.input_axis, *users

    def scatter(self, path: str, value: NDArray[Any], tensor: NDArray[Any]) -> None:
        """Put a variable's values where they belong in a tensor.

        Args:
            path: of the variable; `value` has its shape.
            tensor: of the tensor's shape; the elements of other variables are left alone.
        """
        conversion = self.conversions[path]
        place = self.tensors[conversion.tensor]
        if _transposed(conversion, place.shape, value.shape):
            tensor[...] = value.T
        elif conversion.hook is None:
            tensor[...] = value
        else:
            index = self._index(conversion, place.shape, path)
            assert index is not None
            tensor.reshape(-1)[index.reshape(-1)] = value.reshape(-1)

    def _place(self, name: str, paths: tuple[str, ...]) -> TensorPlace:
        key = tuple(
            (path.rpartition("/")[2], self.shapes[path], _hook_key(self.conversions[path].hook))
            for path in paths
        )
        if key not in self._known:
            self._known[key] = self._find_shape(name, paths)
        shape, input_axis = self._known[key]
        return TensorPlace(name=name, shape=shape, variables=paths, input_axis=input_axis)

    def _find_shape(self, name: str, paths: Sequence[str]) -> tuple[tuple[int, ...], int | None]:
        """The tensor's shape, and the axis of its inputs."""
        for shape in dict.fromkeys(self._candidates(paths)):
            orientations: set[int | None] = set()
            seen = np.zeros(math.prod(shape), bool)
            num_elements = 0
            for path in paths:
                conversion, own = self.conversions[path], self.shapes[path]
                if conversion.hook is None or _transposed(conversion, shape, own):
                    whole = shape in (own, own[::-1]) and len(paths) == 1
                    seen[:] = whole
                    num_elements += seen.size
                    if path not in self.layouts:
                        orientations.add(None)
                        continue
                index = self._index(conversion, shape, path)
                if index is None:
                    break
                if conversion.hook is not None and not _transposed(conversion, shape, own):
                    seen[index.reshape(-1)] = True
                    num_elements += index.size
                orientations.add(_input_axis(index, self.layouts.get(path), shape))
            else:
                # Of a longer table than the variable, its first rows.
                unread = int(seen.argmax())
                moved = num_elements == seen.size - unread and seen[unread:].all()
                if moved and len(orientations) == 1:
                    [orientation] = orientations
                    if orientation != _SPREAD:
                        return shape, orientation
        raise ExportError(
            f"{paths[0]}: KerasHub's converter does not simply move {name} there, so the way back "
            "is unknown; models of this family cannot be exported"
        )

    def _candidates(self, paths: Sequence[str]) -> Iterator[tuple[int, ...]]:
        """Shapes that a tensor may have, given the variables that it holds."""
        first = self.shapes[paths[0]]
        if len(paths) == 1 and self.conversions[paths[0]].hook is None:
            yield first
            return
        total = sum(math.prod(self.shapes[path]) for path in paths)
        layouts = [self.layouts[path] for path in paths if path in self.layouts]
        if len(layouts) == len(paths):
            inputs = layouts[0].in_features
            if all(layout.in_features == inputs for layout in layouts):
                yield total // inputs, inputs
                yield inputs, total // inputs
            return
        if len(first) == 1 or paths[0].endswith("/bias"):
            yield (total,)
        if len(paths) == 1:
            yield first
            yield first[::-1]
        if len(paths) == 1 and len(first) == 2:
            for rows in range(1, _MAX_UNREAD_ROWS + 1):
                yield first[0] + rows, first[1]

    def _index(self, conversion: Conversion, shape: tuple[int, ...], path: str) -> Index | None:
        """The tensor's element, by its flat index, for each element of the variable.

        None where the converter does not take a tensor of this shape, or computes with it.
        """
        size = math.prod(shape)
        numbers = np.arange(size, dtype=np.int32 if size < 2**31 else np.int64).reshape(shape)
        own = self.shapes[path]
        with contextlib.suppress(SourceError):
            index = converted_value(conversion, numbers, own, path).view(np.ndarray)
            moved = index.shape == own and index.dtype.kind == "i" and index.size > 0
            if moved and index.min() >= 0 and index.max() < size:
                return index
        return None


_MAX_UNREAD_ROWS = 4
"""RoBERTa counts its positions from 2: of the rows before, one is never read, and one is that of
padding."""
_SPREAD = -1
"""Neither rows nor columns of the tensor are a layer's inputs."""


def _input_axis(index: Index, layout: KernelLayout | None, shape: tuple[int, ...]) -> int | None:
    if layout is None:
        return None
    index_RC = layout.to_matrix(index)
    row_RC, column_RC = np.divmod(index_RC, shape[1])
    if (row_RC == row_RC[:, :1]).all() and (column_RC == column_RC[:1]).all():
        return 1
    if (row_RC == row_RC[:1]).all() and (column_RC == column_RC[:, :1]).all():
        return 0
    return _SPREAD


def _transposed(conversion: Conversion, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Whether the hook only transposes, found without touching memory: tables are large."""
    if conversion.hook is None or len(shape) != 2 or own != shape[::-1]:
        return False
    # Its pages are never written, and so never exist.
    probe = np.empty(shape, np.uint8)
    try:
        found = conversion.hook(probe, list(own))
    except (ValueError, IndexError, TypeError):
        return False
    return (
        isinstance(found, np.ndarray)
        and np.may_share_memory(found, probe)
        and found.ctypes.data == probe.ctypes.data
        and (found.shape, found.strides) == (own, probe.T.strides)
    )


def _hook_key(hook: Hook | None) -> Hashable:
    """Equal for hooks that do the same: those of a block and of the next."""
    code = getattr(hook, "__code__", None)
    cells = getattr(hook, "__closure__", None) or ()
    key = (code, getattr(hook, "__defaults__", None), *(cell.cell_contents for cell in cells))
    try:
        hash(key)
    except TypeError:
        return id(hook)
    return key if code is not None else id(hook)


def find_places(config: PresetFiles, skeleton: Skeleton) -> TensorPlaces:
    """Run KerasHub's converter backwards.

    Args:
        config: a Hugging Face folder; its config.json alone is used.
        skeleton: in float, of the same model, and used for nothing else.

    Raises:
        ExportError: the converter computes with weights.
        SourceError: there is no converter for this model.
    """
    converter = find_converter(config)
    backbone = skeleton.backbone
    if not isinstance(backbone, converter.backbone_cls):
        raise ExportError(
            f"{config.url}: config.json is of a {converter.backbone_cls.__name__}, and the result "
            f"is a {type(backbone).__name__}; name the folder of the model that was quantized"
        )
    loader = _NamesOnly(config.url)
    before = {id(variable) for variable in backbone.variables if variable._value is not None}
    recipes: dict[str, Step] = {}
    with (
        keras_errors(
            f"{config.url}: KerasHub's converter for {type(backbone).__name__} cannot be run "
            "backwards",
            "models of this family cannot be exported",
        ),
        assigning(backbone.variables, lambda one, given: recipes.update({one.path: given.step})),
    ):
        converter.convert_weights(backbone, loader, config.parse("config.json"))
    conversions = dict(loader.conversions)
    for variable in backbone.variables:
        if variable._value is None or id(variable) in before:
            continue
        path, value = str(variable.path), np.asarray(variable.value)
        if path not in conversions:
            conversions[path] = Conversion(constant=value)
        elif not np.array_equal(value, _stand_in(variable.shape, str(value.dtype))):
            raise loader.computes(conversions[path].tensor)
    shapes = {str(variable.path): tuple(variable.shape) for variable in backbone.variables}
    experts = {
        name: one
        for path, recipe in recipes.items()
        for name, one in expert_tensors(path, shapes[path], recipe, loader.computes).items()
    }
    zeros = _kinds_of_text(config, skeleton, conversions)
    return TensorPlaces(skeleton, conversions, zeros, experts)


def _stand_in(shape: Sequence[int], dtype: str) -> NDArray[Any]:
    """Values by which to tell whether a converter that computes with a variable changes it."""
    size = math.prod(int(length) for length in shape)
    return (np.arange(size) % 251 + 1).reshape(shape).astype(dtype)


_KINDS_OF_TEXT = "embeddings.token_type_embeddings.weight"
_WORDS = "embeddings.word_embeddings.weight"


def _kinds_of_text(
    config: PresetFiles, skeleton: Skeleton, conversions: Mapping[str, Conversion]
) -> dict[str, tuple[int, ...]]:
    """The table of kinds of text, where KerasHub has none: its rows are added, so they are zeros.

    KerasHub adds XLM-R's only row to its positions; RoBERTa's is zeros to begin with.
    """
    num_kinds = config.parse("config.json").get("type_vocab_size")
    tensors = {conversion.tensor: path for path, conversion in conversions.items()}
    words = next((name for name in tensors if name.endswith(_WORDS)), None)
    if not num_kinds or words is None or any(name.endswith(_KINDS_OF_TEXT) for name in tensors):
        return {}
    shapes = {str(variable.path): variable.shape for variable in skeleton.backbone.variables}
    name = words.removesuffix(_WORDS) + _KINDS_OF_TEXT
    return {name: (int(num_kinds), int(shapes[tensors[words]][1]))}


class _NamesOnly(SafetensorLoader):  # type: ignore[misc]  # KerasHub carries no types
    """Answers like KerasHub's loader for a checkpoint of which nothing but the names is wanted.

    A converter that asks whether a tensor exists is told that it does not: what it probes for are
    the names that older versions of transformers gave.
    """

    def __init__(self, url: str) -> None:
        contextlib.ExitStack.__init__(self)
        self.preset = url
        self.safetensor_config: dict[str, Any] = {"weight_map": {}}
        self.safetensor_files: dict[str, Any] = {}
        self.prefix: str | None = ""
        self.fname = None
        self.conversions: dict[str, Conversion] = {}

    def computes(self, tensor: str) -> ExportError:
        return ExportError(
            f"{self.preset}: KerasHub's converter computes with {tensor} itself, so the way back "
            "is unknown; models of this family cannot be exported"
        )

    def get_tensor(self, hf_weight_key: str) -> Any:
        if hf_weight_key.endswith(_KINDS_OF_TEXT):
            return np.zeros((1, 1), np.float32)
        if is_of_one_expert(hf_weight_key):
            return recorded_tensor(hf_weight_key, self.computes)
        raise self.computes(hf_weight_key)

    def port_weight(
        self, keras_variable: Any, hf_weight_key: str, hook_fn: Hook | None = None
    ) -> None:
        self.conversions[str(keras_variable.path)] = Conversion(tensor=hf_weight_key, hook=hook_fn)
        # Keras asks for this if the converter computes with the variable.
        keras_variable._initializer = lambda shape, dtype: keras.ops.convert_to_tensor(
            _stand_in(shape, "float32"), dtype
        )
