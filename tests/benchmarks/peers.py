"""quantfleet beside llm-compressor and GPTQModel: time and perplexity on one real model.

    python -m tests.benchmarks.peers --envs FOLDER [--bits 4 3 2] [--blocks 2 --samples 2]

All quantize SmolLM2-135M-Instruct, dithered, from the same float32 weights and the same token
windows, to the same asymmetric grids in groups of 64. Each peer runs with its authors' defaults and
with the best setting that we know of: a search of each group's range for the least squared error.
All are judged by one float model on the same other text, which takes every quantizer's effective
weights; ours is judged as stock KerasHub loads it. They take turns, on all cores, in one run.

Seconds are of the whole command, from start to written result, and of quantizing alone: of a
peer's quantizing call, and of our run once it is planned, reading and writing weights included.

The peers are installed into virtual environments below FOLDER at the first run, 1.5 GB each with a
PyTorch for CPUs. Which build of it they get is for pip's settings to say (PIP_INDEX_URL,
PIP_FIND_LINKS).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
import safetensors.numpy
import yaml
from numpy.typing import NDArray

from pipeline.calibration.windows import TextStream, make_windows
from pipeline.recipe.recipe import Calibration
from tests.benchmarks.perplexity import perplexity, put_weights
from tests.models.smollm2 import smollm2_preset
from tests.models.smollm2_huggingface import smollm2_directory
from tests.models.texts import evaluation_documents, write_texts

TORCH = "torch==2.13.0"
PEERS = {
    "llmcompressor": ("llmcompressor==0.14.0.1", "transformers<=5.17"),
    "gptqmodel": ("gptqmodel==7.6.0", "transformers<=5.17"),
}
"""What to install for each; peer_<name>.py runs it."""
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "llmcompressor": {"default": {}, "observer=mse": {"observer": "mse"}},
    "gptqmodel": {"default": {}, "mse=2.4": {"mse": 2.4}},
}
"""Of each peer: what its script adds to the defaults, by name."""
GROUP_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one quantizer did.

    Attributes:
        quantizer: its name, and its setting where that is not the default.
        bits: of the weights.
        command_seconds: from the command's start to its written result.
        call_seconds: of quantizing alone, when it has started and read the model.
        perplexity: of the result.
    """

    quantizer: str
    bits: int
    command_seconds: float
    call_seconds: float
    perplexity: float

    def __str__(self) -> str:
        return (
            f"{self.quantizer:28}{self.bits:4}{self.command_seconds:9.1f}{self.call_seconds:8.1f}"
            f"{self.perplexity:14.3f}"
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What everybody gets.

    Attributes:
        folder: for models, texts and results.
        preset: the model as a KerasHub preset.
        directory: the same weights as a Hugging Face directory.
        calibration: settings of our recipe, whose windows the peers take over.
        evaluation_WT: [windows, tokens] of other text.
    """

    folder: Path
    preset: Path
    directory: Path
    calibration: Calibration
    evaluation_WT: NDArray[np.int32]


def prepare(
    folder: Path, *, num_samples: int, sequence_length: int, num_windows: int, blocks: int | None
) -> Work:
    """Write the model, twice, and the texts."""
    preset = smollm2_preset(folder / "preset", dither=True, num_blocks=blocks)
    texts, _ = write_texts(folder / "texts")
    calibration = Calibration(
        texts=(str(texts),),
        num_samples=num_samples,
        sequence_length=sequence_length,
        sampling="sequential",
    )
    tokenizer = keras_hub.models.Tokenizer.from_preset(str(preset))
    judged = calibration.model_copy(update={"num_samples": num_windows})
    windows = make_windows(
        [TextStream.of_all(evaluation_documents(), judged)],
        tokenizer,
        judged,
        end_token=tokenizer.end_token_id,
    )
    return Work(
        folder=folder,
        preset=preset,
        directory=smollm2_directory(folder / "huggingface", dither=True, num_blocks=blocks),
        calibration=calibration,
        evaluation_WT=windows.tokens,
    )


def run_quantfleet(work: Work, bits: int) -> tuple[Outcome, Path]:
    """Quantize with ours; also return where its token windows are."""
    recipe = work.folder / f"w{bits}.yaml"
    scheme = {"mode": "gptq", "weight_bits": bits, "group_size": GROUP_SIZE}
    best = {"activation_order": True, "scale_search": True, "refinement_sweeps": 2}
    content = {
        "name": f"peers-w{bits}",
        "scheme": {**scheme, **best},  # as in the recipes that come with the package
        "calibration": work.calibration.model_dump(mode="json"),
    }
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    output = work.folder / f"quantfleet-w{bits}"
    command = [str(Path(sys.executable).with_name("quantfleet")), "quantize", str(work.preset)]
    options = ["--recipe", str(recipe), "--output", str(output), "--json"]
    seconds, summary = _timed([*command, *options])
    task = keras_hub.models.CausalLM.from_preset(str(output / "artifact"))
    outcome = Outcome(
        quantizer="quantfleet",
        bits=bits,
        command_seconds=seconds,
        call_seconds=json.loads(summary)["wall_seconds"],
        perplexity=perplexity(task, work.evaluation_WT),
    )
    [windows] = (output / "tokens").iterdir()
    return outcome, windows


def run_peer(
    name: str, setting: str, python: Path, work: Work, bits: int, windows: Path
) -> Outcome:
    """Quantize with a peer, on the token windows that ours has used."""
    tokens = work.folder / "tokens.npy"
    np.save(tokens, safetensors.numpy.load_file(windows)["tokens"])
    run = f"{name}-{setting}-w{bits}"
    job, weights = work.folder / f"{run}.json", work.folder / f"{run}.safetensors"
    content = {
        "model": str(work.directory),
        "tokens": str(tokens),
        "bits": bits,
        "group_size": GROUP_SIZE,
        "options": SETTINGS[name][setting],
        "output": str(weights),
    }
    job.write_text(json.dumps(content), encoding="utf-8")
    script = Path(__file__).with_name(f"peer_{name}.py")
    # -P: modules beside the script must not hide the peer's.
    seconds, output = _timed([str(python), "-P", str(script), str(job)])
    task = keras_hub.models.CausalLM.from_preset(str(work.preset))
    put_weights(task, safetensors.numpy.load_file(weights))
    return Outcome(
        quantizer=name if setting == "default" else f"{name}, {setting}",
        bits=bits,
        command_seconds=seconds,
        call_seconds=json.loads(output.splitlines()[-1])["seconds"],
        perplexity=perplexity(task, work.evaluation_WT),
    )


def install(name: str, folder: Path) -> Path:
    """Make a peer's virtual environment unless it is complete, and return its Python."""
    python, mark = folder / name / "bin" / "python", folder / name / "complete"
    wanted = "\n".join((TORCH, *PEERS[name]))
    if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
        venv.create(folder / name, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        # First of all, or another package chooses its build.
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, TORCH, *PEERS[name]], check=True)
        mark.write_text(wanted, encoding="utf-8")
    return python


def _timed(command: list[str]) -> tuple[float, str]:
    """Run a command to its end; its log goes to our standard error, its output is returned."""
    began = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - began, done.stdout


def compare(work: Work, pythons: dict[str, Path], widths: list[int]) -> None:
    """Print a line per quantizer and width as soon as it is known."""
    task: Any = keras_hub.models.CausalLM.from_preset(str(work.preset))
    print(f"{'quantizer':28}bits  command    call    perplexity   (seconds, seconds)")
    print(f"{'float32':28}{32:4}{'':17}{perplexity(task, work.evaluation_WT):14.3f}", flush=True)
    for bits in widths:
        outcome, windows = run_quantfleet(work, bits)
        print(outcome, flush=True)
        for name, python in pythons.items():
            for setting in SETTINGS[name]:
                print(run_peer(name, setting, python, work, bits, windows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", type=Path, required=True, help="the peers' environments")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--bits", nargs="+", type=int, choices=[2, 3, 4, 8], default=[4, 3, 2])
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows")
    parser.add_argument("--blocks", type=int, help="only so many of the model's 30 blocks")
    arguments = parser.parse_args()
    pythons = {name: install(name, arguments.envs.resolve()) for name in arguments.peers}
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        work = prepare(
            Path(folder),
            num_samples=arguments.samples,
            sequence_length=arguments.length,
            num_windows=arguments.windows,
            blocks=arguments.blocks,
        )
        compare(work, pythons, arguments.bits)


if __name__ == "__main__":
    main()
