"""SmolLM2-135M, exported: transformers, vLLM and GPTQModel answer as stock KerasHub does."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.artifact.verification import ask_stock
from pipeline.export.checkpoint import plan_checkpoint
from pipeline.export.writing import write_checkpoint
from pipeline.model.preset import read_preset
from pipeline.plan import read_plan
from pipeline.storage.object_store import open_store
from tests.models.smollm2_huggingface import smollm2_directory
from tests.models.texts import evaluation_documents, write_texts
from tests.pipeline.export.runs import finished_run
from tests.serve.environments import ask

# Solving and exporting a model of 30 blocks six times takes minutes.
pytestmark = [pytest.mark.serve, pytest.mark.timeout(7200)]


def gptq(bits: int, *, symmetric: bool) -> dict[str, Any]:
    return {"mode": "gptq", "weight_bits": bits, "group_size": 64, "symmetric": symmetric}


EXACT = {
    "4 bits, symmetric": gptq(4, symmetric=True),
    "4 bits, asymmetric": gptq(4, symmetric=False),
    "3 bits, symmetric": gptq(3, symmetric=True),
    "3 bits, asymmetric": gptq(3, symmetric=False),
}
ROUNDED = {"int8": {"mode": "int8"}, "float8": {"mode": "float8"}}
# vLLM's kernels for CPUs take neither 3 bits nor float8.
IN_VLLM = ("4 bits, symmetric", "4 bits, asymmetric", "int8")
IN_GPTQMODEL = ("4 bits, symmetric", "3 bits, asymmetric")


@dataclass(frozen=True)
class Served:
    """An artifact and its exports, and the logits of stock KerasHub for `windows`."""

    artifact: Path
    exports: dict[str, Path]
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    windows: Path
    by_scheme: dict[str, Served]

    def jobs(self, as_format: str, schemes: Any, **more: Any) -> list[dict[str, Any]]:
        """A job for each scheme's export."""
        return [
            {
                "folder": str(self.by_scheme[name].exports[as_format]),
                "inputs": str(self.windows),
                "outputs": str(self.windows.parent / f"{as_format} {name}.npy"),
                **more,
            }
            for name in schemes
        ]

    def perplexity(self, logits: NDArray[np.float32]) -> float:
        return perplexity(logits, np.load(self.windows))


def perplexity(logits: NDArray[np.float32], windows: NDArray[np.int32]) -> float:
    values = logits[:, :-1].astype(np.float64)
    values -= values.max(-1, keepdims=True)
    chosen = np.take_along_axis(values, windows[:, 1:, None], -1)[..., 0]
    return math.exp(np.mean(np.log(np.exp(values).sum(-1)) - chosen))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    root = tmp_path_factory.mktemp("smollm2")
    # Weights that do not lie on a grid of 4 bits already.
    source = smollm2_directory(root / "source", dither=True)
    texts, _ = write_texts(root)
    calibration = {"texts": [str(texts)], "num_samples": 4, "sequence_length": 128}
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokens = tokenizer.encode("\n\n".join(evaluation_documents()[:40])).ids
    windows = np.array(tokens[: 4 * 256], np.int32).reshape(4, 256)
    np.save(root / "windows.npy", windows)
    exports: dict[str, dict[str, Path]] = {}
    for name, scheme in {**EXACT, **ROUNDED}.items():
        url = str(root / name / "run")
        run, manifest = finished_run(source, url, scheme, calibration=calibration)
        artifact = read_preset(f"{run.root_url}/artifact")
        exports[name] = {}
        wanted = {"compressed-tensors": "float32"}
        wanted |= {"dense": "float32"} if name in ROUNDED else {}
        wanted |= {"gptq": "float16"} if name in IN_GPTQMODEL else {}
        for as_format, dtype in wanted.items():
            folder = root / name / as_format
            checkpoint = plan_checkpoint(read_plan(run), artifact, as_format, dtype=dtype)
            write_checkpoint(checkpoint, run, manifest, open_store(str(folder)))
            exports[name][as_format] = folder
    artifacts = {name: root / name / "run" / "artifact" for name in exports}
    answers = ask_stock([*artifacts.values()], [windows] * len(artifacts)).outputs
    yield Model(
        windows=root / "windows.npy",
        by_scheme={
            name: Served(artifact=artifacts[name], exports=exports[name], logits=logits)
            for name, logits in zip(artifacts, answers, strict=True)
        },
    )
    # Gigabytes, which pytest would keep.
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def in_transformers(model: Model) -> dict[str, NDArray[np.float32]]:
    jobs = model.jobs("compressed-tensors", [*EXACT, *ROUNDED]) + model.jobs("dense", ROUNDED)
    ask("transformers", jobs)
    return {Path(job["outputs"]).stem: np.load(job["outputs"]) for job in jobs}


@pytest.fixture(scope="module")
def in_vllm(model: Model) -> dict[str, dict[str, Any]]:
    prompt = "The capital of France is"
    # Its kernel for 4 bits takes no float32.
    jobs = model.jobs("compressed-tensors", IN_VLLM, dtype="bfloat16", prompt=prompt)
    return dict(zip(IN_VLLM, ask("vllm", jobs), strict=True))


def distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("name", EXACT)
def test_transformers_answers_as_stock_keras_does(
    name: str, model: Model, in_transformers: dict[str, NDArray[np.float32]]
) -> None:
    keras, found = model.by_scheme[name].logits, in_transformers[f"compressed-tensors {name}"]
    assert distance(found, keras) < 1e-4
    assert model.perplexity(found) == pytest.approx(model.perplexity(keras), rel=1e-4)


@pytest.mark.parametrize("name", ROUNDED)
def test_where_inputs_are_rounded_runtimes_differ_by_that_rounding(
    name: str, model: Model, in_transformers: dict[str, NDArray[np.float32]]
) -> None:
    # The dense checkpoint has the same weights and rounds no inputs: its distance to Keras is what
    # rounding costs. Keras divides the largest input by 127, compressed-tensors by 127.5.
    keras = model.by_scheme[name].logits
    found, dense = (in_transformers[f"{one} {name}"] for one in ("compressed-tensors", "dense"))
    assert np.abs(found - keras).mean() <= 2 * np.abs(dense - keras).mean()
    assert model.perplexity(found) == pytest.approx(model.perplexity(keras), rel=0.03)


@pytest.mark.parametrize("name", IN_VLLM)
def test_vllm_has_the_perplexity_of_stock_keras(
    name: str, model: Model, in_vllm: dict[str, dict[str, Any]]
) -> None:
    assert in_vllm[name]["layers"]
    expected = model.perplexity(model.by_scheme[name].logits)
    assert in_vllm[name]["perplexity"] == pytest.approx(expected, rel=0.01)


def test_vllm_generates(in_vllm: dict[str, dict[str, Any]]) -> None:
    assert all(answer["text"].strip() for answer in in_vllm.values())
    assert "Paris" in in_vllm["int8"]["text"]


@pytest.mark.parametrize("name", IN_GPTQMODEL)
def test_gptqmodel_answers_as_stock_keras_does(name: str, model: Model, tmp_path: Path) -> None:
    # It computes in float16, which takes a CPU long.
    first = np.load(model.windows)[:1]
    np.save(tmp_path / "first.npy", first)
    [job] = model.jobs("gptq", [name], inputs=str(tmp_path / "first.npy"))
    ask("gptqmodel", [job])
    found, keras = np.load(job["outputs"]), model.by_scheme[name].logits[:1]
    assert perplexity(found, first) == pytest.approx(perplexity(keras, first), rel=0.01)
