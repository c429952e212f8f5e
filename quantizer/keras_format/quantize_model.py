"""Quantize a Keras model in memory, as stock Keras can save and load it.

report = quantizer.quantize_model(model, quantizer.GPTQScheme(), calibration=batches)
quantizer.save_model(model, "model.keras")
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras

from quantizer.errors import CalibrationError, LayerError, SchemeError
from quantizer.hessian import CalibrationStatistics, HessianSum, MagnitudeSum
from quantizer.keras_format.input_statistics import Wanted, gather_statistics
from quantizer.keras_format.layers import (
    check_storable,
    check_weights,
    install,
    kernel_layout,
    layer_format,
    solve_layer,
)
from quantizer.keras_format.model_layers import (
    WITH_KERNEL,
    WITH_TABLE,
    layer_name,
    obstacle,
    walk,
)
from quantizer.keras_format.stored_policies import StoredFormats, stored_formats
from quantizer.result import SolveReport
from quantizer.schemes import AWQScheme, Float8Scheme, GPTQScheme, Int4Scheme, Int8Scheme, Scheme

_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerResult:
    """What became of one layer that holds a matrix.

    Attributes:
        path: the layer's path, which rules are matched with.
        num_weights: elements of its matrices.
        requested: the scheme that was asked for, be it possible or not.
        scheme: the one that it has; None if it was left as it was.
        report: the solver's; its output error is None without calibration.
        reason: why the layer was left as it was.
    """

    path: str
    num_weights: int
    requested: Scheme | None = None
    scheme: Scheme | None = None
    report: SolveReport | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReport:
    """What `quantize_model` did.

    Attributes:
        layers: every layer that holds a matrix, in the order of the model.
        unused_rules: patterns that decided no layer: mistyped, or shadowed by one before.
    """

    layers: tuple[LayerResult, ...]
    unused_rules: tuple[str, ...] = ()

    @property
    def quantized_share(self) -> float:
        """Share of the matrices' elements that are quantized, 0 to 1."""
        whole = sum(layer.num_weights for layer in self.layers)
        return sum(layer.num_weights for layer in self.layers if layer.scheme) / whole

    @property
    def fulfilled_share(self) -> float:
        """The same share of those for which a scheme was asked for."""
        whole = sum(layer.num_weights for layer in self.layers if layer.requested)
        return sum(layer.num_weights for layer in self.layers if layer.scheme) / whole


def quantize_model(
    model: keras.Model,
    scheme: Scheme | None,
    *,
    rules: Mapping[str, Scheme | None] | None = None,
    embeddings: Scheme | None = None,
    calibration: Iterable[Any] | None = None,
) -> ModelReport:
    """Quantize the layers of a built Keras model in place; it computes with them at once.

    Sequential and functional models, and subclassed ones whose classes Keras can save. Quantized
    are Dense, EinsumDense, Embedding and ReversibleEmbedding layers, also inside other layers. What
    stock Keras could not load quantized stays in float, and the report says why. `save_model` saves
    the result.

    All layers are calibrated at once on their inputs in the float model. (The pipeline for presets
    calibrates each layer on its inputs in the quantized one, which is more exact for deep models.)
    The model is held in memory whole, and so is one [in_features, in_features] matrix a layer.

    A compiled model gets a fresh optimizer with the settings of its own, whose state was that of
    the float matrices.

    Args:
        scheme: of every Dense and EinsumDense layer that no rule matches; None leaves them in
            float.
        rules: exceptions: a regular expression, searched for in the layer's path, and the scheme,
            or None for float. The first that matches decides.
        embeddings: of every Embedding and ReversibleEmbedding: int8, int4, or None for float.
        calibration: batches as the model takes them, without labels: any iterable of arrays, or of
            tuples, lists or dicts of arrays; it is passed over once. gptq, awq and float8 need it,
            others use it to report their output error. Rows that are masked in a layer's own input
            (by `Embedding(mask_zero=True)`, say) are left out; MultiHeadAttention drops the mask
            before its projections.

    Returns:
        What was done with each layer. The model is untouched when an error is raised.

    Raises:
        SchemeError: a scheme that layers cannot take, or a pattern that is none.
        CalibrationError: no calibration where one is needed, unusable batches, or layers that no
            batch reached.
        LayerError: nothing would be quantized, or Keras cannot save the model.
        WeightError: weights that are not finite.
    """
    plan = _plan(model, scheme, rules, embeddings)
    statistics = _statistics(model, plan.chosen, calibration)
    # All are solved before any is changed: an error leaves the model as it was.
    solved = {
        number: solve_layer(layer, wanted, statistics.get(number))
        for number, (layer, wanted) in plan.chosen.items()
    }
    results = list(plan.report.layers)
    for number, result in solved.items():
        install(plan.chosen[number][0], result)
        results[number] = replace(results[number], report=result.report)
    plan.stored.apply()
    _compile_again(model)
    return replace(plan.report, layers=tuple(results))


def plan_model(
    model: keras.Model,
    scheme: Scheme | None,
    *,
    rules: Mapping[str, Scheme | None] | None = None,
    embeddings: Scheme | None = None,
) -> ModelReport:
    """What `quantize_model` would do with each layer; nothing is calibrated or changed.

    Args and errors as there, but for those of calibration. No layer has a report.
    """
    return _plan(model, scheme, rules, embeddings).report


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be done.

    Attributes:
        chosen: the layers to quantize, by their place in the report.
        stored: what has to be done so that Keras stores their formats.
    """

    report: ModelReport
    chosen: Mapping[int, tuple[keras.layers.Layer, Scheme]]
    stored: StoredFormats


def _plan(
    model: keras.Model,
    scheme: Scheme | None,
    rules: Mapping[str, Scheme | None] | None,
    embeddings: Scheme | None,
) -> _Plan:
    choice = _Choice(scheme, dict(rules or {}), embeddings)
    results, chosen = _choose(model, choice)
    formats = {id(layer): layer_format(layer, wanted) for layer, wanted in chosen.values()}
    stored = stored_formats(model, formats)
    for number, (layer, _) in list(chosen.items()):
        if id(layer) in stored.lost:
            results[number] = replace(results[number], scheme=None, reason=stored.lost[id(layer)])
            del chosen[number]
    _check_not_empty(model, results, chosen)
    _check_schemes(chosen)
    report = ModelReport(layers=tuple(results), unused_rules=choice.unused_rules)
    return _Plan(report, chosen, stored)


class _Choice:
    """Which scheme each layer is to have."""

    def __init__(
        self, scheme: Scheme | None, rules: Mapping[str, Scheme | None], embeddings: Scheme | None
    ) -> None:
        for given in (scheme, embeddings, *rules.values()):
            if given is not None and not isinstance(given, Scheme):
                raise SchemeError(
                    f"{given!r} is no scheme; give one such as Int8Scheme(), or None for float"
                )
        if not isinstance(embeddings, Int8Scheme | Int4Scheme | None):
            raise SchemeError(
                f"stock Keras quantizes embeddings to int8 or int4 only, not {embeddings.mode}; "
                "give embeddings=Int8Scheme(), or None for float"
            )
        for pattern in rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise SchemeError(f"rule {pattern!r} is no regular expression: {error}") from None
        self._scheme, self._rules, self._embeddings = scheme, rules, embeddings
        self._used: set[str] = set()

    def scheme_for(self, layer: keras.layers.Layer) -> tuple[Scheme | None, str]:
        """The layer's scheme; None for float, and why."""
        if type(layer) in WITH_TABLE:
            return self._embeddings, "no scheme was given for embeddings"
        path = layer_name(layer)
        for pattern, scheme in self._rules.items():
            if re.search(pattern, path):
                self._used.add(pattern)
                return scheme, f"the rule {pattern!r} says so"
        return self._scheme, "no scheme was given for it"

    @property
    def unused_rules(self) -> tuple[str, ...]:
        return tuple(pattern for pattern in self._rules if pattern not in self._used)


_Chosen = dict[int, tuple[keras.layers.Layer, Scheme]]


def _choose(model: keras.Model, choice: _Choice) -> tuple[list[LayerResult], _Chosen]:
    """All layers with matrices; and, by their place among them, those to quantize."""
    results: list[LayerResult] = []
    chosen: _Chosen = {}
    for layer, parents in walk([model]):
        if type(layer) in WITH_KERNEL + WITH_TABLE and not layer.built:
            raise LayerError(
                f"{layer_name(layer)}: the layer has no weights yet; call the model on a batch, or "
                "build it, before it is quantized"
            )
        reason = obstacle(layer, parents)
        if reason is None and type(layer) not in WITH_KERNEL + WITH_TABLE:
            continue
        scheme, why_not = choice.scheme_for(layer)
        if layer.quantization_mode is not None:
            scheme, reason = None, f"already quantized ({layer.dtype_policy.name})"
        elif scheme is None:
            reason = why_not
        elif reason is None:
            reason = _unstorable(layer, scheme)
        if reason is None:
            assert scheme is not None
            chosen[len(results)] = layer, scheme
        results.append(
            LayerResult(
                path=layer_name(layer),
                num_weights=_num_matrix_elements(layer),
                requested=scheme,
                scheme=None if reason else scheme,
                reason=reason or "",
            )
        )
    return results, chosen


def _unstorable(layer: keras.layers.Layer, scheme: Scheme) -> str | None:
    try:
        check_storable(layer, scheme)
    except LayerError as error:
        return str(error).removeprefix(f"{layer_name(layer)}: ")
    return None


def _num_matrix_elements(layer: keras.layers.Layer) -> int:
    own = [*layer._trainable_variables, *layer._non_trainable_variables]
    # The biases of attention have two axes, too.
    shapes = [variable.shape for variable in own if variable.name != "bias"]
    return sum(math.prod(shape) for shape in shapes if len(shape) >= 2)


def _check_not_empty(
    model: keras.Model, results: Sequence[LayerResult], chosen: Mapping[int, Any]
) -> None:
    if chosen:
        return
    if not results:
        raise LayerError(f"{model.name}: no layer holds a matrix; is the model built?")
    # Each reason once, with the first layer that it applies to.
    reasons: dict[str, str] = {}
    for layer in results:
        reasons.setdefault(layer.reason, layer.path)
    shown = [f"{path}: {reason}" for reason, path in list(reasons.items())[:_SHOWN]]
    raise LayerError(
        f"{model.name}: none of its {len(results)} layers with matrices would be quantized "
        f"({'; '.join(shown)})"
    )


def _check_schemes(chosen: _Chosen) -> None:
    """Check groups and weights before anything is computed.

    Raises:
        SchemeError: groups larger than a layer, foldable scales or corrected drift; the message
            names the layers.
        WeightError: weights that are not finite.
    """
    for layer, scheme in chosen.values():
        if isinstance(scheme, AWQScheme) and scheme.foldable:
            raise SchemeError(
                f"{layer_name(layer)}: what gives a layer its input is known of a preset's blocks "
                "only, so that no other model can be quantized by a foldable awq; leave foldable "
                "out"
            )
        if isinstance(scheme, GPTQScheme) and scheme.drift_correction:
            raise SchemeError(
                f"{layer_name(layer)}: all layers are calibrated on the inputs that they have in "
                "the float model, so that there is no drift to correct; leave drift_correction out"
            )
    too_small: dict[str, int] = {}
    for layer, scheme in chosen.values():
        if isinstance(scheme, GPTQScheme | AWQScheme):
            in_features = kernel_layout(layer).in_features
            if scheme.group_size > in_features:
                too_small[f"{layer_name(layer)} ({scheme.group_size} > {in_features})"] = (
                    in_features
                )
    if too_small:
        more = "" if len(too_small) <= _SHOWN else f" and {len(too_small) - _SHOWN} more"
        raise SchemeError(
            f"group_size is larger than the layer's input: {', '.join(list(too_small)[:_SHOWN])}"
            f"{more}; use at most {min(too_small.values())}, or -1 for one group, or a rule for "
            "these layers"
        )
    for layer, scheme in chosen.values():
        check_weights(layer, scheme)


def _statistics(
    model: keras.Model,
    chosen: Mapping[int, tuple[keras.layers.Layer, Scheme]],
    calibration: Iterable[Any] | None,
) -> dict[int, CalibrationStatistics | None]:
    kernels = {
        number: (layer, scheme)
        for number, (layer, scheme) in chosen.items()
        if type(layer) in WITH_KERNEL
    }
    wanted = [
        Wanted(
            layer,
            MagnitudeSum if isinstance(scheme, Float8Scheme) else HessianSum,
            required=not isinstance(scheme, Int8Scheme | Int4Scheme),
        )
        for layer, scheme in kernels.values()
    ]
    if calibration is not None and wanted:
        found = gather_statistics(model, wanted, calibration)
        return dict(zip(kernels, found, strict=True))
    for layer, scheme in kernels.values():
        if not isinstance(scheme, Int8Scheme | Int4Scheme):
            raise CalibrationError(
                f"{layer_name(layer)}: {scheme.mode} must see inputs of the layer; give "
                "calibration=[batch, ...], or a scheme that needs none, such as int8"
            )
    return {}


def _compile_again(model: keras.Model) -> None:
    """Drop compiled functions and the optimizer's state, which were of the float matrices."""
    model.train_function = model.test_function = model.predict_function = None
    # PyTorch's backend keeps a list of parameters of its own.
    model._post_quantize(None)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        model.optimizer = type(optimizer).from_config(optimizer.get_config())
        model.optimizer.build(model.trainable_variables)
