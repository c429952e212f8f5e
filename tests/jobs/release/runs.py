"""A small finished run of a Hugging Face folder with a card of its own, evaluated and exported."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

from pipeline.export.exporting import export_run
from pipeline.export.manifest import forget_progress
from pipeline.export.settings import ExportSettings
from pipeline.fidelity import Fidelity
from pipeline.run.commits import read_manifest
from pipeline.run.evaluations import Evaluation
from pipeline.storage.object_store import ObjectStore, open_store
from tests.models.tiny_huggingface import tiny_huggingface
from tests.pipeline.export.runs import finished_run

LICENSE = "\n             Apache License\n       Version 2.0, January 2004\n"
CARD = """---
license: apache-2.0
language: [en, no]
datasets:
- someone/texts
pipeline_tag: text-generation
extra: <b>not carried</b>
---
# The source's own card
"""


@cache
def finished() -> Path:
    """The folder of the run, shared by all tests: copy it to change it."""
    folder = Path(tempfile.mkdtemp(prefix="release-"))
    atexit.register(shutil.rmtree, folder)
    source = tiny_huggingface(folder / "tiny-mistral", "mistral", tokenizer=True)
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text(LICENSE)
    with warnings.catch_warnings():
        # KerasHub leaves the vocabulary open.
        warnings.simplefilter("ignore", ResourceWarning)
        run, _ = finished_run(source, str(folder / "run"), {"mode": "int4", "block_size": 16})
    made = export_run(
        run, ExportSettings(format="compressed-tensors"), f"{run.root_url}/exports/ct"
    )
    forget_progress(open_store(made.url))
    return folder / "run"


def copied(folder: Path) -> ObjectStore:
    """A copy of the run that a test may change."""
    shutil.copytree(finished(), folder)
    return open_store(str(folder))


def evaluate(run: ObjectStore, perplexity: float = 22.0) -> None:
    """Keep an evaluation of a run, without running it."""
    measured_on = {
        "texts_sha256": "ab" * 32,
        "tokens_sha256": "cd" * 32,
        "num_windows": 2,
        "sequence_length": 8,
    }
    fidelity = Fidelity(
        num_windows=2,
        count=14,
        source_perplexity=20.0,
        result_perplexity=perplexity,
        divergence=0.125,
        agreement=0.75,
    )
    Evaluation(
        manifest_sha256=read_manifest(run).record_sha256,
        measured_on=measured_on,
        figures=fidelity.figures(),
    ).save(run)
