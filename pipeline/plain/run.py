"""Quantize a plain Keras model: one `.keras` file × one recipe, in one process.

The model is held in memory whole, with one [in_features, in_features] matrix for each calibrated
layer. There are no blocks, and nothing to resume: an interrupted run starts again. The output
is `model.keras`, then `manifest.json`, which makes it finished; both are written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from pipeline.calibration.arrays import ExpectedInput, read_arrays
from pipeline.canonical import sha256
from pipeline.errors import ObjectExistsError, PlanMismatchError, RecipeError
from pipeline.machine import machine, versions
from pipeline.plain.keras_file import load_model, model_bytes, read_file
from pipeline.plain.plan import MODEL_KEY, PlainPlan
from pipeline.recipe.recipe import Recipe, statistics_of
from pipeline.run.records import FileDigest, LayerRecord, Manifest
from pipeline.storage.object_store import ObjectStore
from quantizer import ModelReport, plan_model, quantize_model

_BATCH = 32
_LEAST_SHARE = 0.5


def make_plan(source_url: str, recipe: Recipe, threads: int) -> PlainPlan:
    """Plan a run; see `pipeline.remote_planning.plan_plain`."""
    if recipe.dtype is not None:
        raise RecipeError(
            f"recipe {recipe.name}: {source_url} keeps its own dtypes, layer by layer; leave dtype "
            "out, or load and save it in another with Keras"
        )
    if recipe.tuning is not None:
        raise RecipeError(
            f"recipe {recipe.name}: tuning trains the blocks of a KerasHub model, and {source_url} "
            "has none; leave tuning out"
        )
    if recipe.uses_float_statistics:
        raise RecipeError(
            f"recipe {recipe.name}: statistics: float stores sums for each block of a KerasHub "
            f"model, and {source_url} has none; leave statistics out"
        )
    data = read_file(source_url)
    model = load_model(data, source_url)
    report = plan_model(model, recipe.scheme, rules=_rules(recipe), embeddings=recipe.embeddings)
    _check_share(report, recipe, source_url)
    layers = _records(report)
    arrays = _arrays(model, recipe, layers, source_url)
    return PlainPlan(
        source_url=source_url,
        source_sha256=sha256(data),
        source_bytes=len(data),
        model=str(model.name),
        recipe=recipe,
        inputs_sha256={
            name: sha256(np.ascontiguousarray(array).view(np.uint8).data)
            for name, array in arrays.items()
        },
        machine=machine(threads),
        versions=versions(),
        layers=layers,
        quantized_share=report.quantized_share,
        unused_rules=report.unused_rules,
    )


def carry_out(plan: PlainPlan, store: ObjectStore) -> Manifest:
    """Quantize, and commit; see `pipeline.remote_planning.quantize_plain`."""
    recipe = plan.recipe
    data = read_file(plan.source_url)
    if sha256(data) != plan.source_sha256:
        raise PlanMismatchError(f"{plan.source_url}: the file was changed since it was planned")
    model = load_model(data, plan.source_url)
    arrays = _arrays(model, recipe, plan.layers, plan.source_url)
    report = quantize_model(
        model,
        recipe.scheme,
        rules=_rules(recipe),
        embeddings=recipe.embeddings,
        calibration=_batches(model, arrays) if arrays else None,
    )
    content = model_bytes(model)
    try:
        store.create(MODEL_KEY, content)
    except ObjectExistsError:
        raise PlanMismatchError(
            f"{store.url(MODEL_KEY)} holds another model, of a run that was interrupted or of "
            "another recipe; delete it, or give another output"
        ) from None
    manifest = Manifest(
        plan_digest=plan.digest,
        files={MODEL_KEY: FileDigest(sha256=sha256(content), size_bytes=len(content))},
        records={},
        provenance=plan.provenance(_records(report)),
    )
    store.create(manifest.key, manifest.to_json())
    return manifest


def _check_share(report: ModelReport, recipe: Recipe, where: str) -> None:
    """Refuse to quantize less than half of the weights that a recipe asks for."""
    if recipe.allow_partial or report.fulfilled_share >= _LEAST_SHARE:
        return
    left = [layer for layer in report.layers if layer.requested and layer.scheme is None]
    largest = max(left, key=lambda layer: layer.num_weights)
    raise RecipeError(
        f"{where}: recipe {recipe.name} would quantize {report.fulfilled_share:.0%} of the weights "
        f"that it asks for; most are in {largest.path} and its like ({largest.reason}). If this is "
        "wanted, give --allow-partial; or leave these layers out by a rule with scheme: null"
    )


def _rules(recipe: Recipe) -> dict[str, Any]:
    rules: dict[str, Any] = {}
    for rule in recipe.rules:
        rules.setdefault(rule.pattern, rule.scheme)
    return rules


def _records(report: ModelReport) -> tuple[LayerRecord, ...]:
    return tuple(
        LayerRecord(
            path=layer.path,
            scheme=layer.scheme,
            account=None if layer.report is None else layer.report.to_dict(),
            note=layer.reason,
        )
        for layer in report.layers
    )


def _arrays(
    model: keras.Model, recipe: Recipe, layers: tuple[LayerRecord, ...], where: str
) -> dict[str, NDArray[Any]]:
    """The calibration arrays by input; none where no layer is calibrated.

    Raises:
        RecipeError: none are given, or texts.
        CalibrationInputError: a file that cannot be used.
    """
    if not any(statistics_of(layer.scheme) for layer in layers):
        return {}
    tensors = {str(tensor.name): tensor for tensor in model.inputs}
    example = ", ".join(f"{name}: {name}.npy" for name in tensors)
    calibration = recipe.calibration
    if calibration is None or calibration.texts or not calibration.inputs:
        raise RecipeError(
            f"recipe {recipe.name}: {where} takes arrays, not texts; calibrate it with inputs: "
            f"{{{example}}} (with --inputs, or in the recipe's calibration, without texts), or "
            "use a recipe that needs no calibration, such as int8"
        )
    urls = dict(calibration.inputs)
    if len(urls) == len(tensors) == 1:
        # Keras may have made up the name of a single input.
        urls = dict(zip(tensors, urls.values(), strict=True))
    missing = sorted(tensors.keys() - urls.keys())
    if missing:
        raise RecipeError(
            f"recipe {recipe.name}: calibration.inputs lacks {', '.join(missing)}; {where} takes "
            f"{{{example}}}"
        )
    expected = {
        name: ExpectedInput(shape=tuple(tensor.shape[1:]), dtype=str(tensor.dtype))
        for name, tensor in tensors.items()
    }
    return read_arrays(urls, expected, num_samples=calibration.num_samples)


def _batches(model: keras.Model, arrays: Mapping[str, NDArray[Any]]) -> Iterator[Any]:
    """Batches of the arrays, in the structure that the model takes."""
    # A Sequential model has no `input` before it is called.
    wanted = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    num_samples = len(next(iter(arrays.values())))
    for start in range(0, num_samples, _BATCH):
        part = {name: array[start : start + _BATCH] for name, array in arrays.items()}
        yield keras.tree.map_structure(lambda tensor, part=part: part[str(tensor.name)], wanted)
