"""Calibration and evaluation text: enough, the same every time, and disjoint."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.models.texts import calibration_documents, evaluation_documents, write_texts


def test_no_paragraph_occurs_twice() -> None:
    documents = [*calibration_documents(), *evaluation_documents()]
    paragraphs = [paragraph for text in documents for paragraph in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_there_is_enough_to_calibrate_and_to_evaluate_on() -> None:
    assert sum(map(len, calibration_documents())) > 400_000
    assert sum(map(len, evaluation_documents())) > 100_000
    assert min(map(len, [*calibration_documents(), *evaluation_documents()])) >= 400


def test_files_hold_a_document_a_line_and_are_the_same_in_every_process(tmp_path: Path) -> None:
    calibration, evaluation = write_texts(tmp_path / "one")
    for path, documents in (
        (calibration, calibration_documents()),
        (evaluation, evaluation_documents()),
    ):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [{"text": text} for text in documents]
    command = [sys.executable, "-m", "tests.models.texts", str(tmp_path / "two")]
    root = Path(__file__).parent.parent.parent
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONHASHSEED": "7"})
    for path in (calibration, evaluation):
        again = tmp_path / "two" / path.name
        assert (
            hashlib.sha256(again.read_bytes()).digest()
            == hashlib.sha256(path.read_bytes()).digest()
        )
