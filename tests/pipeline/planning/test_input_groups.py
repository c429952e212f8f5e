"""What tracing finds out before anything is computed: who shares an input, who is never called."""

from __future__ import annotations

from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from keras.src.utils.naming import reset_uids

from pipeline.errors import CalibrationInputError, RecipeError, SourceError
from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import fidelity_of
from pipeline.model.blocks import find_blocks
from pipeline.model.inputs import input_layout
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.plan import Plan
from pipeline.planning.input_groups import block_uses
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.recipe.recipe import Calibration, Recipe
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.storage.object_store import open_store
from pipeline.worker.worker import Worker
from quantizer.schemes import Float8Scheme, GPTQScheme, Int8Scheme
from tests.families.tiny_families import shared_family
from tests.models.tiny import randomize
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.tiny_runs import text_file


def read_apart(family: str) -> list[str]:
    skeleton = build_skeleton(read_preset(str(shared_family(family))))
    return sorted(block_uses(find_blocks(skeleton), input_layout(skeleton)).apart)


def test_kernels_that_a_block_reads_past_their_layers_are_found() -> None:
    """KerasHub's Gemma4 multiplies with layer.kernel, which are codes once it is quantized."""
    names = ("ffw_gating", "ffw_gating_2", "ffw_linear")
    expected = [f"decoder_block_{block}/{name}" for block in range(2) for name in names]
    assert read_apart("Gemma4") == expected
    assert read_apart("Llama3") == []


def test_a_plan_leaves_them_in_float_and_says_why() -> None:
    recipe = Recipe(name="a", scheme=Int8Scheme(), allow_partial=True)
    plan: Plan = make_plan(read_preset(str(shared_family("Gemma4"))), recipe, threads=1).plan
    layers = {layer.name: layer for layer in plan.parts[1].layers}
    assert layers["ffw_gating"].scheme is None
    assert "reads the kernel past the layer" in layers["ffw_gating"].note
    assert layers["attention/query"].scheme == Int8Scheme()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier of images: a model without text."""
    folder = tmp_path_factory.mktemp("vit")
    reset_uids()
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(16, 16, 3),
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        name="backbone",
    )
    task = keras_hub.models.ViTImageClassifier(
        backbone=backbone, num_classes=4, preprocessor=None, name="task"
    )
    randomize(task, 0)
    task.save_to_preset(str(folder / "preset"))
    np.save(folder / "images.npy", images())
    return folder


def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 16, 16, 3)).astype("float32")


def planned(classifier: Path, *, texts: bool = False, num_samples: int = 6) -> Planned:
    inputs = {} if texts else {"images": str(classifier / "images.npy")}
    calibration = Calibration(
        texts=(str(text_file()),) if texts else (), inputs=inputs, num_samples=num_samples
    )
    recipe = Recipe(name="float8", scheme=Float8Scheme(), calibration=calibration)
    return make_plan(read_preset(str(classifier / "preset")), recipe, threads=1)


@pytest.mark.exhaustive
def test_a_model_of_images_is_calibrated_on_arrays(classifier: Path) -> None:
    given = planned(classifier)
    assert given.windows is not None
    assert given.plan.tokens is not None
    assert given.plan.tokens.sequence_length == 17  # patches and the class token
    store = open_store(str(classifier / "run"))
    claim(store, given.plan, given.windows.to_bytes())
    worker = Worker(given.plan, str(classifier / "preset"), store.root_url)
    quantize(given.plan, store, LocalExecutor([worker]), lambda step: None)
    kind = keras_hub.models.ViTImageClassifier
    quantized = kind.from_preset(str(classifier / "run" / "artifact"))
    source = kind.from_preset(str(classifier / "preset"))
    answers = [np.asarray(model(images()), "float64") for model in (source, quantized)]
    query = next(
        x for x in quantized._flatten_layers() if "transformer_block_1/mha/query" in str(x.path)
    )
    assert float(keras.ops.convert_to_numpy(query.inputs_scale).item()) != 1.0
    assert 0 < np.abs(answers[0] - answers[1]).max() < 0.1 * np.abs(answers[0]).max()
    given_set = EvaluationSet(windows=given.windows)
    found = fidelity_of(given_set, worker.evaluate(given_set, range(len(given_set.batches))))
    cosines = [
        np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*answers, strict=True)
    ]
    assert found.cosine == pytest.approx(np.mean(cosines), rel=1e-5)


@pytest.mark.exhaustive
def test_a_model_of_images_says_that_it_needs_them(classifier: Path) -> None:
    with pytest.raises(SourceError, match="input 'images' that text does not determine; give it"):
        planned(classifier, texts=True)
    with pytest.raises(CalibrationInputError, match="holds 6 samples, but num_samples is 7"):
        planned(classifier, num_samples=7)


def test_a_model_of_text_says_that_it_needs_texts(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 8), np.int32))
    calibration = Calibration(inputs={"segment_ids": str(tmp_path / "a.npy")}, num_samples=4)
    scheme = GPTQScheme(weight_bits=4, group_size=16)
    recipe = Recipe(name="a", scheme=scheme, calibration=calibration)
    with pytest.raises(RecipeError, match=r"takes text; add calibration: \{texts"):
        make_plan(read_preset(str(shared_family("Bert"))), recipe, threads=1)
