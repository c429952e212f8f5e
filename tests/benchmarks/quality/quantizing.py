"""Quantize the model as a row says, by ours, by a peer, or by rounding to nearest."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
import safetensors.numpy
import yaml
from numpy.typing import NDArray

from pipeline.calibration.windows import TokenWindows
from pipeline.recipe.recipe import Calibration
from quantizer.qparams import decode, encode, find_grid
from tests.benchmarks.quality.peers import PEERS, TORCH, install, run_peer
from tests.benchmarks.quality.rows import GROUP_SIZE, OURS, ROUNDING, Row
from tests.benchmarks.quality.weights import Weights, effective_weights, is_norm

_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model that everybody quantizes.

    Attributes:
        preset: as KerasHub has it.
        directory: the same weights as a Hugging Face directory.
        shapes: of its variables; see `weights.variable_shapes`.
        environments: the folder of the peers' environments; None if there is none.
    """

    preset: Path
    directory: Path
    shapes: dict[str, tuple[int, ...]]
    environments: Path | None


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a quantizer made.

    Attributes:
        weights: for the float model's blocks; None if only its own layers can run it.
        task: the artifact as stock KerasHub loads it, where there is one.
        seconds: of the whole command, and of quantizing alone.
    """

    weights: Weights | None
    task: Any
    seconds: dict[str, float]


def version(row: Row) -> str:
    """Of a row's quantizer: of all that decides its bytes but the row."""
    if row.quantizer in PEERS:
        return " ".join((TORCH, *PEERS[row.quantizer]))
    code = hashlib.sha256()
    for folder in ("quantizer", "pipeline"):
        for file in sorted((_ROOT / folder).rglob("*.py")):
            code.update(_code(file.read_text(encoding="utf-8")).encode())
    packages = [f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "keras")]
    return " ".join((code.hexdigest()[:12], *packages))


def quantize(
    row: Row, source: Source, windows: TokenWindows, calibration: Calibration, work: Path
) -> Quantized:
    """Run a row's quantizer; what an earlier attempt left in the folder is taken up.

    Raises:
        ValueError: a row that nothing here can run.
        subprocess.CalledProcessError: the quantizer failed; it has said why.
    """
    if row.quantizer == ROUNDING:
        return _rounded(row, source)
    work.mkdir(parents=True, exist_ok=True)
    if row.quantizer == OURS:
        return _ours(row, source, windows, calibration, work)
    if row.quantizer not in PEERS:
        raise ValueError(
            f"{row}: no quantizer {row.quantizer}; there are {OURS}, {ROUNDING} and "
            f"{', '.join(PEERS)}"
        )
    if source.environments is None:
        raise ValueError(f"{row}: name a folder for the peers' environments, --envs")
    file, seconds = run_peer(
        row.quantizer,
        install(row.quantizer, source.environments),
        model=source.directory,
        tokens_WT=windows.tokens,
        bits=row.bits,
        group_size=GROUP_SIZE,
        options=row.setting,
        work=work,
    )
    weights = _float(source) | safetensors.numpy.load_file(file)
    return Quantized(weights=weights, task=None, seconds=seconds)


def _ours(
    row: Row, source: Source, windows: TokenWindows, calibration: Calibration, work: Path
) -> Quantized:
    recipe, output = work / "recipe.yaml", work / "run"
    ours = row.our_recipe(calibration)
    content = ours.to_dict() | {"name": "row"}
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("quantfleet")), "quantize", str(source.preset)]
    command += ["--recipe", str(recipe), "--output", str(output), "--json", "--device", "cpu"]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    if ours.needs_calibration and not (output / windows.key).exists():
        raise ValueError(f"{row}: calibrated on other windows than the peers; see {output}")
    task = keras_hub.models.CausalLM.from_preset(str(output / "artifact"))
    return Quantized(
        weights=None if content["embeddings"] else effective_weights(task, source.shapes),
        task=task,
        seconds={"command": seconds, "quantizing": json.loads(done.stdout)["wall_seconds"]},
    )


def _float(source: Source) -> dict[str, NDArray[np.float32]]:
    """The blocks' weights as they are."""
    weights = safetensors.numpy.load_file(source.directory / "model.safetensors")
    return {name: weight for name, weight in weights.items() if name.startswith("model.layers.")}


def _rounded(row: Row, source: Source) -> Quantized:
    weights = _float(source)
    began = time.perf_counter()
    for name, weight_RC in weights.items():
        if is_norm(name):
            continue
        weight_CR = weight_RC.T
        scale_GR, zero_GR = find_grid(
            weight_CR,
            np.ones((len(weight_CR), 1), np.float32),
            weight_bits=row.bits,
            group_size=GROUP_SIZE,
            symmetric=False,
            search=False,
            scale_dtype="float32",
        )
        group_C = np.arange(len(weight_CR)) // GROUP_SIZE
        scale_CR, zero_CR = np.asarray(scale_GR)[group_C], np.asarray(zero_GR)[group_C]
        code_CR = encode(weight_CR, scale_CR, zero_CR, 2.0**row.bits - 1)
        weights[name] = np.asarray(decode(code_CR, scale_CR, zero_CR)).T
    seconds = {"quantizing": time.perf_counter() - began}
    return Quantized(weights=weights, task=None, seconds=seconds)


def _code(text: str) -> str:
    """Python without comments, docstrings and layout, none of which decides a byte."""
    tree = ast.parse(text)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def forget(work: Path) -> None:
    """Delete what a quantizer wrote, once it is judged."""
    shutil.rmtree(work, ignore_errors=True)
