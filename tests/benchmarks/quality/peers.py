"""Other quantizers, each in a virtual environment of its own.

The environments are made below a folder at the first run, 1.5 GB each with a PyTorch for CPUs.
Which build of it they get is for pip's settings to say (PIP_INDEX_URL, PIP_FIND_LINKS).
"""

from __future__ import annotations

import json
import subprocess
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TORCH = "torch==2.13.0"
PEERS = {
    "llmcompressor": ("llmcompressor==0.14.0.1", "transformers<=5.17"),
    "gptqmodel": ("gptqmodel==7.6.0", "transformers<=5.17"),
}
"""What to install for each; peer_<name>.py runs it."""


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


def run_peer(
    name: str,
    python: Path,
    *,
    model: Path,
    tokens_WT: NDArray[np.int32],
    bits: int,
    group_size: int,
    options: dict[str, Any],
    work: Path,
) -> tuple[Path, dict[str, float]]:
    """Quantize with a peer.

    Args:
        python: of its environment.
        model: a Hugging Face directory.
        options: what its script adds to its authors' defaults.

    Returns:
        A file of effective weights, and seconds of the whole command and of quantizing alone.
    """
    tokens, job, weights = work / "tokens.npy", work / "job.json", work / "weights.safetensors"
    np.save(tokens, tokens_WT)
    content = {
        "model": str(model),
        "tokens": str(tokens),
        "bits": bits,
        "group_size": group_size,
        "options": options,
        "output": str(weights),
    }
    job.write_text(json.dumps(content), encoding="utf-8")
    script = Path(__file__).with_name(f"peer_{name}.py")
    # -P: modules beside the script must not hide the peer's.
    began = time.perf_counter()
    done = subprocess.run(
        [str(python), "-P", str(script), str(job)], check=True, stdout=subprocess.PIPE, text=True
    )
    command = time.perf_counter() - began
    call = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return weights, {"command": command, "quantizing": call}
