"""Each family × scheme, from plan to stock Keras: what works, what is refused, what fails."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import keras
import keras_hub
import numpy as np
from keras.src.utils.naming import reset_uids
from numpy.typing import NDArray

from pipeline.calibration.windows import TokenWindows
from pipeline.errors import PipelineError, RecipeError
from pipeline.model.inputs import InputLayout, input_layout
from pipeline.model.preset import read_preset
from pipeline.model.skeleton import build_skeleton
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.recipe.recipe import Calibration, Recipe
from pipeline.run.claim import claim
from pipeline.run.driver import quantize
from pipeline.run.records import Manifest
from pipeline.storage.object_store import open_store
from pipeline.worker.worker import Worker
from quantizer.schemes import GPTQScheme, Int8Scheme, Scheme
from tests.families.tiny_families import FAMILIES, Family, tiny_family
from tests.pipeline.local_executor import LocalExecutor
from tests.stock import read_experts, read_kernel, run_layer

SCHEMES: dict[str, Scheme] = {
    "gptq": GPTQScheme(weight_bits=4, group_size=16, scale_search=False),
    "int8": Int8Scheme(),
}
_TEXT = "The quick brown fox jumps over the lazy dog, again and again and again. " * 4
# Of answers in float32, relative to the largest. int8 rounds inputs that may lie on a tie, and one
# that falls to the other side moves more of them.
_TOLERANCE = {"gptq": 1e-4, "int8": 3e-2}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one family with one scheme.

    Attributes:
        share: of the weights that the recipe asks for, those that are quantized.
        partial: whether it must be allowed that these are less than half.
        message: of the refusal or the failure; empty where everything works.
    """

    family: str
    scheme: str
    kind: Literal["works", "refused", "fails"]
    share: float = 0.0
    partial: bool = False
    message: str = ""


def matrix(families: Iterable[Family] = FAMILIES) -> Iterator[Outcome]:
    """Try families with every scheme."""
    for family in families:
        with tempfile.TemporaryDirectory(prefix="family-") as folder:
            source = tiny_family(family, Path(folder) / "source")
            for scheme in SCHEMES:
                yield attempt(family, source, scheme, Path(folder) / scheme)


def attempt(family: Family, source: Path, scheme: str, folder: Path) -> Outcome:
    """Plan, quantize, load with stock Keras and compare; see `Outcome`.

    Args:
        source: the family's tiny preset.
        folder: of the run.
    """

    def outcome(kind: Literal["works", "refused", "fails"], **more: Any) -> Outcome:
        return Outcome(family=family.name, scheme=scheme, kind=kind, **more)

    stage = "planning"
    try:
        preset, recipe = read_preset(str(source)), _recipe(family, source, scheme)
        try:
            planned = make_plan(preset, recipe, threads=1)
        except RecipeError as error:
            if "--allow-partial" not in str(error):
                raise
            recipe = recipe.model_copy(update={"allow_partial": True})
            planned = make_plan(preset, recipe, threads=1)
    except PipelineError as error:
        return outcome("refused", message=str(error).replace(str(source), "PRESET"))
    except Exception as error:  # noqa: BLE001  # crashes are what the matrix is to find
        return outcome("fails", message=_described(stage, error))
    try:
        stage = "quantizing"
        share = planned.plan.share.of_recipe
        manifest = _quantize(planned, source, folder)
        assert ("quantized_share" in manifest.provenance) == (share < 0.95), "not in the manifest"
        stage = "stock Keras"
        _check_stock(family, planned, source, folder / "artifact", scheme)
    except Exception as error:  # noqa: BLE001
        return outcome("fails", message=_described(stage, error))
    return outcome("works", share=share, partial=planned.plan.recipe.allow_partial)


def _described(stage: str, error: Exception) -> str:
    return f"{stage}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"


@cache
def _texts() -> str:
    path = Path(tempfile.mkdtemp(prefix="texts-")) / "english.txt"
    path.write_text(_TEXT, encoding="utf-8")
    return str(path)


def _recipe(family: Family, source: Path, scheme: str) -> Recipe:
    inputs = {}
    layout = input_layout(build_skeleton(read_preset(str(source))))
    for name, array in _noise(layout, 4, family.input_length).items():
        inputs[name] = str(source.parent / f"{name}.npy")
        np.save(inputs[name], array)
    calibration = Calibration(texts=(_texts(),), num_samples=4, sequence_length=16, inputs=inputs)
    return Recipe(name=scheme, scheme=SCHEMES[scheme], calibration=calibration)


def _quantize(planned: Planned, source: Path, folder: Path) -> Manifest:
    store = open_store(str(folder))
    claim(store, planned.plan, planned.windows.to_bytes() if planned.windows else None)
    worker = Worker(planned.plan, str(source), str(folder))
    return quantize(planned.plan, store, LocalExecutor([worker]), lambda step: None)


def _check_stock(
    family: Family, planned: Planned, source: Path, artifact: Path, scheme: str
) -> None:
    """Load twice, and compare with NumPy's account of what the stored numbers mean."""
    model_class = getattr(keras_hub.models, family.task or family.backbone)
    # A backbone without a task has to be told the dtype in its own config.
    config = json.loads((artifact / "config.json").read_text())["config"]
    dtype = {} if family.task else {"dtype": config["dtype"]}
    reset_uids()  # a fresh process
    fresh = model_class.from_preset(str(artifact), **dtype)
    # Now the process has built models before.
    used = model_class.from_preset(str(artifact), **dtype)
    modes = [
        [getattr(layer, "quantization_mode", None) for layer in _backbone(model)._flatten_layers()]
        for model in (fresh, used)
    ]
    assert modes[0] == modes[1], "other layers are quantized in a process that built models before"
    layers = [x for part in planned.plan.parts for x in part.layers if x.scheme is not None]
    experts = {x.path for x in layers if x.experts}
    wanted = len(layers) - len(experts)
    found = sum(mode is not None for mode in modes[0])
    assert found == wanted, f"{found} layers are quantized where {wanted} are planned"
    inputs = _inputs(family, source, fresh)
    answers = [_answer(task, inputs) for task in (fresh, used)]
    np.testing.assert_array_equal(*answers)
    reference = model_class.from_preset(str(source), dtype="float32")
    _replace_layers(reference, fresh)
    assert _replace_experts(reference, fresh, artifact.parent) == experts
    expected = _answer(reference, inputs)
    assert np.isfinite(expected).all(), "its answers are not finite"
    distance = np.abs(answers[0] - expected).max() / np.abs(expected).max()
    assert distance <= _TOLERANCE[scheme], f"its answers differ by {distance:.1e}"


def _backbone(model: Any) -> Any:
    return getattr(model, "backbone", model)


def _replace_layers(model: Any, quantized: Any) -> None:
    """Let a float model compute as its quantized layers must, by NumPy alone (`tests.stock`)."""
    sides = (_backbone(model)._flatten_layers(), _backbone(quantized)._flatten_layers())
    pairs = zip(*sides, strict=True)
    for layer, other in pairs:
        if getattr(other, "quantization_mode", None) is None:
            continue
        other._dtype_policy = other.dtype_policy[other.path]  # as `read_kernel` wants it
        kernel = read_kernel(other, layer._kernel.shape)

        def call(inputs: Any, *, _kernel: Any = kernel, _layer: Any = other, **_: Any) -> Any:
            output = run_layer(_layer, _kernel, np.asarray(inputs)).astype("float32")
            return _layer.activation(keras.ops.convert_to_tensor(output))

        object.__setattr__(layer, "call", call)


def _replace_experts(model: Any, quantized: Any, run: Path) -> set[str]:
    """Give a float model the experts that the codes of a run stand for; returns their paths."""
    kernels: dict[str, NDArray[Any]] = {}
    for file in sorted(run.glob("codes/*.safetensors")):
        kernels |= read_experts(file.read_bytes())
    found = set()
    sides = (_backbone(model)._flatten_layers(), _backbone(quantized)._flatten_layers())
    for layer, other in zip(*sides, strict=True):
        # Of a quantized layer some are missing.
        for variable, same in zip(
            layer._trainable_variables, other._trainable_variables, strict=False
        ):
            if str(same.path) in kernels:
                variable.assign(kernels[str(same.path)])
                found.add(str(same.path))
    return found


def _inputs(family: Family, source: Path, model: Any) -> dict[str, NDArray[Any]]:
    """Two texts without padding, no images beside them, and noise for what must be given."""
    layout = input_layout(build_skeleton(read_preset(str(source))))
    rng = np.random.default_rng(0)
    windows = TokenWindows(
        tokens=rng.integers(5, 250, (2, 16)).astype(np.int32),
        lengths=np.full(2, 16, np.int32),
        fingerprint="",
        num_documents=0,
        decoder_start=(0,) if layout.takes_two_texts else (),
        inputs=_noise(layout, 2, family.input_length),
    )
    arrays = layout.batch(windows, slice(None), 2).arrays
    return {name: arrays[name] for name in model.input}


def _noise(layout: InputLayout, num_samples: int, length: int) -> dict[str, NDArray[Any]]:
    """Arrays for inputs that text does not determine."""
    rng = np.random.default_rng(1)
    names = [] if layout.encoders else layout.missing(())
    shapes = {name: [size or length for size in layout.inputs[name].shape] for name in names}
    return {
        name: rng.normal(size=(num_samples, *shape)).astype("float32")
        if "float" in layout.inputs[name].dtype
        else np.ones((num_samples, *shape), np.int32)
        for name, shape in shapes.items()
    }


def _answer(task: Any, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    answer = keras.tree.flatten(task(inputs))
    return np.concatenate([np.asarray(x, "float32").ravel() for x in answer])
