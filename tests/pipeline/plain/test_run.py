"""A plain Keras model × a recipe: planned, quantized and committed once, model before manifest."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers

import pipeline.plain.run
from pipeline.errors import (
    CalibrationInputError,
    PipelineError,
    PlanMismatchError,
    RecipeError,
    SourceError,
)
from pipeline.plain.keras_file import load_model, model_bytes
from pipeline.plain.plan import MODEL_KEY, is_plain, layer_records
from pipeline.plain.run import carry_out, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.recipe_file import builtin_recipes
from pipeline.run.commits import damaged_files, read_manifest
from pipeline.run.records import MANIFEST_KEY
from pipeline.storage.object_store import open_store
from quantizer import GPTQScheme, Int8Scheme, SchemeError, quantize_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    keras.utils.set_random_seed(0)
    left, right = keras.Input((16,), name="left"), keras.Input((16,), name="right")
    x = layers.Dense(16, activation="relu", name="shared")
    out = layers.Dense(16, name="top")(x(left) + x(right))
    keras.Model({"left": left, "right": right}, out).save(path / "two.keras")
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        np.save(path / f"{name}.npy", rng.normal(size=(40, 16)).astype("float32"))
    convolution = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            layers.Conv2D(32, 3, name="large"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, name="top"),
        ]
    )
    convolution.save(path / "convolution.keras")
    return path


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "out"))


def recipe(folder, **changes):
    inputs = {name: str(folder / f"{name}.npy") for name in ("left", "right")}
    values = {
        "name": "tiny",
        "scheme": GPTQScheme(weight_bits=3, group_size=8),
        "calibration": {"inputs": inputs, "num_samples": 40},
    }
    return Recipe.model_validate(values | changes)


def plan(folder, made=None, source="two"):
    return make_plan(str(folder / f"{source}.keras"), made or recipe(folder), 1)


def test_the_result_is_that_of_quantize_model_on_the_arrays(folder, store):
    made = plan(folder, recipe(folder, rules=[{"pattern": "top", "scheme": Int8Scheme()}]))
    manifest = carry_out(made, store)
    model = load_model((folder / "two.keras").read_bytes(), "two.keras")
    arrays = {name: np.load(folder / f"{name}.npy") for name in ("left", "right")}
    batches = ({name: array[a:b] for name, array in arrays.items()} for a, b in [(0, 32), (32, 40)])
    report = quantize_model(
        model, made.recipe.scheme, rules={"top": Int8Scheme()}, calibration=batches
    )
    assert store.get(MODEL_KEY) == model_bytes(model)
    assert [record.account for record in layer_records(manifest)] == [
        layer.report.to_dict() for layer in report.layers
    ]
    # Both calls of the shared layer count.
    assert report.layers[0].report.num_rows == 80


def test_the_manifest_is_last_and_vouches_for_the_model(folder, store):
    made = plan(folder)
    manifest = carry_out(made, store)
    assert store.list() == (MANIFEST_KEY, MODEL_KEY)
    assert read_manifest(store) == manifest
    assert is_plain(manifest)
    assert manifest.plan_digest == made.digest
    assert damaged_files(store, manifest) == ()
    assert manifest.provenance["quantized_share"] == 1
    assert set(manifest.provenance["inputs_sha256"]) == {"left", "right"}


@pytest.mark.exhaustive
def test_an_interrupted_run_starts_again_to_the_same_bytes(folder, store, monkeypatch):
    def crash(*_, **__):
        raise KeyboardInterrupt

    made = plan(folder)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.plain.run, "Manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            carry_out(made, store)
    assert store.list() == (MODEL_KEY,)
    written = store.version(MODEL_KEY)
    carry_out(plan(folder), store)
    assert store.version(MODEL_KEY) == written
    # Whatever else is there is never overwritten.
    store.delete(MANIFEST_KEY)
    other = plan(folder, recipe(folder, scheme=Int8Scheme()))
    with pytest.raises(PlanMismatchError, match=r"model\.keras holds another model.*delete it"):
        carry_out(other, store)


def test_whatever_decides_the_result_decides_the_digest(folder, tmp_path):
    digest = plan(folder).digest
    assert plan(folder).digest == digest
    np.save(tmp_path / "left.npy", np.ones((40, 16), "float32"))
    inputs = {"left": str(tmp_path / "left.npy"), "right": str(folder / "right.npy")}
    changed = recipe(folder, calibration={"inputs": inputs, "num_samples": 40})
    assert plan(folder, changed).digest != digest
    assert plan(folder, recipe(folder, scheme=Int8Scheme())).digest != digest


class TestRefusedWhilePlanning:
    def refuse(self, error, match, folder, made=None, source="two"):
        with pytest.raises(error, match=match):
            plan(folder, made, source)

    def test_texts(self, folder):
        given = builtin_recipes()["gptq-w4-g32"].model_copy(
            update={"scheme": GPTQScheme(group_size=8)}
        )
        expected = r"takes arrays, not texts.*inputs: \{left: left\.npy, right: right\.npy\}"
        self.refuse(RecipeError, expected, folder, given)

    def test_an_input_without_its_array_and_an_array_without_its_input(self, folder):
        left = {"left": str(folder / "left.npy")}
        one = recipe(folder, calibration={"inputs": left, "num_samples": 40})
        self.refuse(RecipeError, "inputs lacks right", folder, one)
        more = left | {"right": left["left"], "middle": left["left"]}
        three = recipe(folder, calibration={"inputs": more, "num_samples": 40})
        self.refuse(CalibrationInputError, "middle: the model has no such input", folder, three)

    def test_too_few_samples(self, folder):
        inputs = {name: str(folder / f"{name}.npy") for name in ("left", "right")}
        self.refuse(
            CalibrationInputError,
            "holds 40 samples, but num_samples is 128",
            folder,
            recipe(folder, calibration={"inputs": inputs}),
        )

    def test_another_dtype(self, folder):
        self.refuse(RecipeError, "leave dtype out", folder, recipe(folder, dtype="bfloat16"))

    def test_what_needs_blocks(self, folder):
        self.refuse(RecipeError, "leave tuning out", folder, recipe(folder, tuning={"steps": 1}))
        drifting = GPTQScheme(weight_bits=3, group_size=8, drift_correction=0.5)
        expected = "shared: .*no drift to correct; leave drift_correction out"
        self.refuse(SchemeError, expected, folder, recipe(folder, scheme=drifting))

    def test_a_small_share_of_what_is_asked_for(self, folder):
        int8 = builtin_recipes()["int8"]
        expected = "10% of the weights.*large and its like .*Conv2D.*--allow-partial"
        self.refuse(RecipeError, expected, folder, int8, "convolution")
        allowed = plan(folder, int8.model_copy(update={"allow_partial": True}), "convolution")
        assert [record.note for record in allowed.layers if record.scheme] == [""]
        by_rule = recipe(folder, scheme=Int8Scheme(), rules=[{"pattern": "large", "scheme": None}])
        assert plan(folder, by_rule, "convolution").quantized_share == pytest.approx(0.1)

    def test_no_such_file(self, folder):
        self.refuse(SourceError, "no such file", folder, source="none")


def test_a_source_that_changes_after_planning_is_refused(folder, store):
    made = dataclasses.replace(plan(folder), source_sha256="0" * 64)
    with pytest.raises(PipelineError, match="changed since it was planned"):
        carry_out(made, store)
    assert store.list() == ()
