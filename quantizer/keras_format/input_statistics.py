"""Calibration statistics of many layers at once, from batches through the float model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import keras
import numpy as np
from keras.src.backend import get_keras_mask
from numpy.typing import NDArray

from quantizer.errors import CalibrationError
from quantizer.hessian import CalibrationStatistics, HessianSum, MagnitudeSum
from quantizer.keras_format.layers import kernel_layout
from quantizer.keras_format.model_layers import layer_name, watched_calls

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Wanted:
    """The statistics of a Dense or EinsumDense layer.

    Attributes:
        required: whether it is an error if there are none.
    """

    layer: keras.layers.Layer
    kind: type[CalibrationStatistics]
    required: bool


def gather_statistics(
    model: keras.Model, wanted: Sequence[Wanted], batches: Iterable[Any]
) -> list[CalibrationStatistics | None]:
    """Run the model on each batch once, and sum up the inputs of its layers.

    A layer that is called several times in a batch sums over its calls. Rows that Keras' own mask
    leaves out, where the layer's input carries one, are not counted.

    Args:
        batches: as the model takes them: arrays, or tuples, lists or dicts of arrays.

    Returns:
        For each layer, in the order given; None if it is not required and no batch reached it.

    Raises:
        CalibrationError: batches that the model does not take, no batch at all, inputs that are
            not finite, or required layers that no batch reached.
    """
    _check_iterable(batches)
    by_layer = {id(one.layer): one for one in wanted}
    sums: dict[int, CalibrationStatistics] = {}
    # Keras rewrites what is raised inside a model: it is kept, and raised outside.
    failures: list[str] = []

    def add(layer: keras.layers.Layer, tensor: Any) -> None:
        one, name = by_layer[id(layer)], layer_name(layer)
        if failures:
            return
        if isinstance(tensor, jax.core.Tracer) or keras.utils.is_keras_tensor(tensor):
            if not one.required:
                return
            failures.append(
                f"{name}: it computes inside a loop that Keras compiles, such as that of an RNN or "
                "of TimeDistributed, where its inputs cannot be seen; give it a scheme that needs "
                "no calibration, such as int8, or None"
            )
            return
        try:
            found = _sum_of(one, tensor)
            before = sums.get(id(layer))
            sums[id(layer)] = found if before is None else _merged(before, found)
        except CalibrationError as error:
            failures.append(f"{name}: {error}")

    num_batches = 0
    for number, batch in enumerate(batches):
        num_batches = number + 1
        with watched_calls([one.layer for one in wanted], add):
            try:
                model(batch, training=False)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise CalibrationError(
                    f"{model.name}: calibration batch {number}, {_described(batch)}, is not what "
                    f"the model takes ({type(error).__name__}: {reason}); give batches of its "
                    "inputs alone, without labels"
                ) from error
        if failures:
            raise CalibrationError(f"calibration batch {number}: {failures[0]}")
    if not num_batches:
        raise CalibrationError(
            f"{model.name}: the calibration holds no batch; an iterator can be used only once"
        )
    found = [sums.get(id(one.layer)) for one in wanted]
    missing = [
        layer_name(one.layer)
        for one, statistics in zip(wanted, found, strict=True)
        if one.required and (statistics is None or not statistics.num_rows)
    ]
    if missing:
        raise CalibrationError(
            f"{', '.join(missing[:_SHOWN])}: no calibration row reached "
            f"{'this layer' if len(missing) == 1 else f'these {len(missing)} layers'} "
            f"({num_batches} batches). Give batches that use them, a scheme that needs no "
            "calibration, such as int8, or None"
        )
    return [statistics if statistics and statistics.num_rows else None for statistics in found]


def _sum_of(one: Wanted, tensor: Any) -> CalibrationStatistics:
    inputs = np.asarray(keras.ops.convert_to_numpy(tensor), dtype=np.float32)
    rows = kernel_layout(one.layer).flatten_inputs(inputs)
    return one.kind.of(rows, _mask(tensor, rows.shape[:-1]))


def _mask(tensor: Any, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    mask = get_keras_mask(tensor)
    if mask is None or tuple(mask.shape) != shape:
        return None
    return np.asarray(keras.ops.convert_to_numpy(mask), dtype=bool)


def _merged(one: CalibrationStatistics, other: CalibrationStatistics) -> CalibrationStatistics:
    if isinstance(one, HessianSum):
        assert isinstance(other, HessianSum)
        return one.merge(other)
    assert isinstance(other, MagnitudeSum)
    return one.merge(other)


def _check_iterable(batches: Iterable[Any]) -> None:
    if hasattr(batches, "shape"):
        raise CalibrationError(
            f"calibration is a single array of shape {tuple(batches.shape)}; give an iterable of "
            "batches, such as [array]"
        )
    if isinstance(batches, Mapping | str | bytes) or not hasattr(batches, "__iter__"):
        raise CalibrationError(
            f"calibration is a {type(batches).__name__}; give an iterable of batches, such as a "
            "list or a generator"
        )


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name!r}: {_described(batch[name])}" for name in batch) + "}"
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return f"a {type(batch).__name__} of {len(batch)}"
    shape = getattr(batch, "shape", None)
    return f"a {type(batch).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")
