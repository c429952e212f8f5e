"""Each family × scheme, from plan to stock Keras: what works, what is refused, what fails."""

from __future__ import annotations

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

from pipeline.errors import PipelineError
from pipeline.model.preset import read_preset
from pipeline.planning import Planned, make_plan
from pipeline.recipe.recipe import Calibration, Recipe
from pipeline.run.driver import claim, quantize
from pipeline.storage.object_store import open_store
from pipeline.worker.worker import Worker
from quantizer.schemes import GPTQScheme, Int8Scheme, Scheme
from tests.families.tiny_families import FAMILIES, Family, tiny_family
from tests.pipeline.local_executor import LocalExecutor
from tests.stock import read_kernel, run_layer

SCHEMES: dict[str, Scheme] = {
    "gptq": GPTQScheme(weight_bits=4, group_size=16, scale_search=False),
    "int8": Int8Scheme(),
}
_TEXT = "The quick brown fox jumps over the lazy dog, again and again and again. " * 4
# Of logits, relative to the largest: in float32, where int8 rounds inputs that may lie on a tie.
_TOLERANCE = {"gptq": 1e-4, "int8": 5e-3}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one family with one scheme.

    Attributes:
        reached: the last stage that passed.
        message: of the refusal or the failure; empty where everything works.
        share: of the weights that the recipe asks for, how many are quantized.
    """

    family: str
    scheme: str
    kind: Literal["works", "refused", "fails"]
    message: str = ""
    share: float | None = None


def matrix(families: Iterable[Family] = FAMILIES) -> Iterator[Outcome]:
    """Try families with every scheme."""
    for family in families:
        with tempfile.TemporaryDirectory(prefix="family-") as folder:
            source = tiny_family(family, Path(folder) / "source")
            for scheme in SCHEMES:
                yield _try(family, source, scheme, Path(folder) / scheme)


def _try(family: Family, source: Path, scheme: str, folder: Path) -> Outcome:
    try:
        planned = make_plan(read_preset(str(source)), _recipe(scheme), threads=1)
    except PipelineError as error:
        message = str(error).replace(f"{source}", "PRESET")
        return Outcome(family=family.name, scheme=scheme, kind="refused", message=message)
    except Exception as error:  # noqa: BLE001  # crashes are what the matrix is to find
        return _failure(family, scheme, "planning", error)
    try:
        _quantize(planned, source, folder)
    except Exception as error:  # noqa: BLE001
        return _failure(family, scheme, "quantizing", error)
    try:
        _check_stock(family, planned, source, folder / "artifact", scheme)
    except Exception as error:  # noqa: BLE001
        return _failure(family, scheme, "stock Keras", error)
    return Outcome(family=family.name, scheme=scheme, kind="works")


def _failure(family: Family, scheme: str, stage: str, error: Exception) -> Outcome:
    message = f"{stage}: {type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome(family=family.name, scheme=scheme, kind="fails", message=message)


@cache
def _texts() -> str:
    path = Path(tempfile.mkdtemp(prefix="texts-")) / "english.txt"
    path.write_text(_TEXT, encoding="utf-8")
    return str(path)


def _recipe(scheme: str) -> Recipe:
    calibration = Calibration(texts=(_texts(),), num_samples=4, sequence_length=16)
    return Recipe(name=scheme, scheme=SCHEMES[scheme], calibration=calibration)


def _quantize(planned: Planned, source: Path, folder: Path) -> None:
    store = open_store(str(folder))
    claim(store, planned.plan, planned.windows.to_bytes() if planned.windows else None)
    worker = Worker(planned.plan, str(source), str(folder))
    quantize(planned.plan, store, LocalExecutor([worker]), lambda step: None)


def _check_stock(
    family: Family, planned: Planned, source: Path, artifact: Path, scheme: str
) -> None:
    """Load twice, and compare with NumPy's account of what the stored numbers mean."""
    assert family.task is not None
    task_class = getattr(keras_hub.models, family.task)
    reset_uids()  # a fresh process
    fresh = task_class.from_preset(str(artifact))
    # Now the process has built models before.
    used = task_class.from_preset(str(artifact))
    modes = [
        [getattr(layer, "quantization_mode", None) for layer in task.backbone._flatten_layers()]
        for task in (fresh, used)
    ]
    assert modes[0] == modes[1], "other layers are quantized in a process that built models before"
    wanted = sum(x.scheme is not None for part in planned.plan.parts for x in part.layers)
    found = sum(mode is not None for mode in modes[0])
    assert found == wanted, f"{found} layers are quantized where {wanted} are planned"
    inputs = _inputs(fresh)
    answers = [_answer(task, inputs) for task in (fresh, used)]
    np.testing.assert_array_equal(*answers)
    reference = task_class.from_preset(str(source), dtype="float32")
    _replace_layers(reference, fresh)
    expected = _answer(reference, inputs)
    assert np.isfinite(expected).all(), "logits are not finite"
    distance = np.abs(answers[0] - expected).max() / np.abs(expected).max()
    assert distance <= _TOLERANCE[scheme], f"logits differ by {distance:.1e}"


def _replace_layers(task: Any, quantized: Any) -> None:
    """Let a float model compute as its quantized layers must, by NumPy alone (`tests.stock`)."""
    pairs = zip(task.backbone._flatten_layers(), quantized.backbone._flatten_layers(), strict=True)
    for layer, other in pairs:
        if getattr(other, "quantization_mode", None) is None:
            continue
        other._dtype_policy = other.dtype_policy[other.path]  # as `read_kernel` wants it
        kernel = read_kernel(other, layer._kernel.shape)

        def call(inputs: Any, *, _kernel: Any = kernel, _layer: Any = other, **_: Any) -> Any:
            output = run_layer(_layer, _kernel, np.asarray(inputs)).astype("float32")
            return _layer.activation(keras.ops.convert_to_tensor(output))

        object.__setattr__(layer, "call", call)


def _inputs(task: Any) -> dict[str, NDArray[Any]]:
    """Two sequences of twelve tokens without padding, and noise for what is no token."""
    rng = np.random.default_rng(0)
    inputs = {}
    for name, tensor in task.input.items():
        shape = [
            size or default for size, default in zip(tensor.shape, (2, 12, 12, 12), strict=False)
        ]
        if "mask" in name and "positions" not in name:
            inputs[name] = np.ones(shape, np.int32)
        elif "token_ids" in name:
            inputs[name] = rng.integers(5, 250, shape).astype(np.int32)
        elif "positions" in name or "position_ids" in name:
            inputs[name] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        elif "int" in str(tensor.dtype):
            inputs[name] = np.zeros(shape, np.int32)
        else:
            inputs[name] = rng.normal(size=shape).astype("float32")
    return inputs


def _answer(task: Any, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    answer = keras.tree.flatten(task(inputs))
    return np.concatenate([np.asarray(x, "float32").ravel() for x in answer])
