"""What each recipe costs a real language model: SmolLM2-135M-Instruct, beside rounding to nearest.

Every row is a run of `quantfleet quantize` on the same preset, calibration and evaluation texts.
Its weights lie on a 4-bit grid with groups of 32 unless they are spread over their cells
(--dither), so only other settings say anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from pipeline.calibration.windows import TokenWindows
from pipeline.evaluation.batches import EvaluationSet
from pipeline.fidelity import Fidelity, fidelity_of
from pipeline.plan import Plan, read_plan
from pipeline.storage.object_store import open_store
from pipeline.worker.evaluate import evaluate
from pipeline.worker.model_state import ModelState
from pipeline.worker.streamed_model import StreamedModel, source_model
from quantizer import kernel_layout
from quantizer.qparams import decode, encode, find_grid
from tests.models.smollm2 import smollm2_preset
from tests.models.texts import write_texts

BEST = {"activation_order": True, "scale_search": True, "refinement_sweeps": 2}
# Keras' own defaults: inputs in order, a min-max grid.
KERAS = {"activation_order": False, "scale_search": False}


def gptq(bits: int, group_size: int, **options: Any) -> dict[str, Any]:
    return {"mode": "gptq", "weight_bits": bits, "group_size": group_size, **options}


def rows(bits: list[int], group_size: int) -> dict[str, dict[str, Any]]:
    """Schemes by the name of their row."""
    found = {}
    for width in bits:
        found[f"gptq {width}, as Keras"] = gptq(width, group_size, **KERAS)
        found[f"gptq {width}"] = gptq(width, group_size, **BEST)
    return found | {
        "awq 4": {"mode": "awq", "group_size": group_size},
        "awq 4, foldable": {"mode": "awq", "group_size": group_size, "foldable": True},
        "int8": {"mode": "int8"},
        "int4": {"mode": "int4", "block_size": group_size},
        "float8": {"mode": "float8"},
    }


def run_recipe(name: str, scheme: dict[str, Any], work: Path, arguments: Any) -> dict[str, Any]:
    """The summary that `quantfleet quantize --json` prints."""
    slug = name.lower().replace(", ", "-").replace(" ", "-")
    recipe = work / f"{slug}.yaml"
    calibration = {
        "texts": [str(work / "texts/calibration.jsonl")],
        "num_samples": arguments.samples,
        "sequence_length": arguments.length,
    }
    recipe.write_text(yaml.safe_dump({"name": slug, "scheme": scheme, "calibration": calibration}))
    command = [sys.executable, "-m", "jobs.cli.main", "quantize", str(work / "preset")]
    command += ["--recipe", str(recipe), "--output", str(work / slug), "--json"]
    command += ["--evaluate-on", str(work / "texts/evaluation.jsonl")]
    command += ["--windows", str(arguments.windows)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def rounded_model(model: ModelState, bits: int, group_size: int) -> StreamedModel:
    """The source with every kernel of its blocks rounded to nearest, on its min-max grid."""
    plain = source_model(model)
    kernels = {
        str(target.layer._kernel.path): kernel_layout(target.layer)
        for block in plain.graph.blocks
        for target in block.targets
    }

    def read(part: int) -> list[tuple[Any, Any]]:
        return [
            (variable, _rounded(value, kernels[variable.path], bits, group_size))
            if variable.path in kernels
            else (variable, value)
            for variable, value in plain._read(part)
        ]

    return StreamedModel(plain.graph, read)


def _rounded(kernel: np.ndarray, layout: Any, bits: int, group_size: int) -> np.ndarray:
    weight_CR = layout.to_matrix(kernel).T.astype(np.float32)
    scale_GR, zero_GR = find_grid(
        weight_CR,
        np.ones((len(weight_CR), 1), np.float32),
        weight_bits=bits,
        group_size=group_size,
        symmetric=False,
        search=False,
        scale_dtype="float32",
    )
    group_C = np.arange(len(weight_CR)) // group_size
    scale_CR, zero_CR = scale_GR[group_C], zero_GR[group_C]
    restored_CR = decode(encode(weight_CR, scale_CR, zero_CR, 2.0**bits - 1), scale_CR, zero_CR)
    return layout.from_matrix(np.asarray(restored_CR).T)


def rounding(plan: Plan, preset: Path, windows: TokenWindows, bits: int, group: int) -> Fidelity:
    model = ModelState(plan, str(preset))
    result = rounded_model(model, bits, group)
    source = source_model(model)
    given = EvaluationSet(windows=windows)
    numbers = range(len(given.batches))
    found = evaluate(source, result, model.layout, given, numbers, predicts_tokens=True)
    return fidelity_of(given, found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quality", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="a folder")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--dither", action="store_true", help="spread weights over their cells")
    parser.add_argument("--only", nargs="+", help="names of rows")
    arguments = parser.parse_args()
    work: Path = arguments.work / ("dither" if arguments.dither else "plain")
    smollm2_preset(work / "preset", dither=arguments.dither)
    (work / "texts").mkdir(exist_ok=True)
    write_texts(work / "texts")
    console = Console()
    table = Table(title=f"SmolLM2-135M, groups of {arguments.group_size}, {work.name} weights")
    for name in ("", "perplexity", "KL, nats", "same next token", "stored MiB", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    for name, scheme in rows(arguments.bits, arguments.group_size).items():
        if arguments.only and name not in arguments.only:
            continue
        summary = run_recipe(name, scheme, work, arguments)
        found = summary["fidelity"]
        if not table.rows:
            table.add_row("source", f"{found['source_perplexity']:.2f}", "0", "", "513", "")
        table.add_row(
            name,
            f"{found['result_perplexity']:.2f}",
            f"{found['divergence']:.4f}",
            f"{found['agreement']:.1%}",
            f"{summary['stored_bytes'] / 2**20:.0f}",
            f"{summary['wall_seconds']:.0f}",
        )
        console.print(table)
    if not arguments.only:
        store = open_store(str(work / f"gptq-{arguments.bits[0]}"))
        plan = read_plan(store)
        windows = _evaluation(plan, work, arguments.windows)
        for bits in arguments.bits:
            found = rounding(plan, work / "preset", windows, bits, arguments.group_size)
            table.add_row(
                f"rounded {bits}",
                f"{found.result_perplexity:.2f}",
                f"{found.divergence:.4f}",
                f"{found.agreement:.1%}",
            )
        console.print(table)


def _evaluation(plan: Plan, work: Path, windows: int) -> TokenWindows:
    from pipeline.model.preset import read_preset
    from pipeline.model.skeleton import build_skeleton
    from pipeline.planning.token_windows import token_windows
    from pipeline.recipe.recipe import Calibration

    assert plan.tokens is not None
    preset = read_preset(str(work / "preset"))
    wanted = Calibration(
        texts=(str(work / "texts/evaluation.jsonl"),),
        num_samples=windows,
        sequence_length=plan.tokens.sequence_length,
        sampling="sequential",
    )
    return token_windows(preset, build_skeleton(preset), wanted)


if __name__ == "__main__":
    main()
