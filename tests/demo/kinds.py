"""Texts of several kinds that installed packages bring along, for the demo.

To calibrate on: Python's manual, source code of its standard library, and the reference of web
services in botocore. To judge by: other parts of the manual and of the code, and licenses, which
are unlike anything in calibration. No text is in both.
"""

from __future__ import annotations

import gzip
import html
import importlib.metadata
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import botocore

from tests.models.texts import calibration_documents, evaluation_documents

_CODE = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "urllib")
_SERVICES = ("ecs", "lambda", "sns", "sqs")
_LICENSED = ("h5py", "jaxlib", "numpy", "pandas", "pyarrow", "scipy")
_MIN_PARAGRAPH = 100  # characters
_PIECE = 8  # paragraphs
_EVALUATION_EVERY = 4


def write_kinds(folder: Path) -> list[Path]:
    """Write calibration-KIND.jsonl and evaluation-KIND.jsonl, a document per line: {"text": …}."""
    folder.mkdir(parents=True, exist_ok=True)
    code = _code()
    kinds = {
        "calibration-manual": calibration_documents(),
        "calibration-code": [text for i, text in enumerate(code) if i % _EVALUATION_EVERY],
        "calibration-services": _services(),
        "evaluation-manual": evaluation_documents(),
        "evaluation-code": code[::_EVALUATION_EVERY],
        "evaluation-licenses": _licenses(),
    }
    paths = []
    for name, documents in kinds.items():
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(lines), encoding="utf-8")
    return paths


def _code() -> list[str]:
    """Modules of packages of the standard library; the manual's texts are of single files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for name in _CODE for file in (root / name).glob("*.py")]
    files.sort(key=lambda file: (file.name, file.parent.name))  # packages in turn
    return [text for file in files if len(text := file.read_text(encoding="utf-8")) >= 1000]


def _services() -> list[str]:
    """What each operation and shape of a service is for, in pieces, of all services in turn."""
    data = Path(botocore.__file__).parent / "data"
    each = [_distinct(map(_plain, _documentation(_latest(data / name)))) for name in _SERVICES]
    longest = max(map(len, each))
    return [
        "\n\n".join(paragraphs[start : start + _PIECE])
        for start in range(0, longest, _PIECE)
        for paragraphs in each
        if len(paragraphs) > start
    ]


def _latest(service: Path) -> Any:
    file = sorted(service.glob("*/service-2.json.gz"))[-1]
    return json.loads(gzip.decompress(file.read_bytes()))


def _documentation(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for name, value in values.items():
            if name == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(values, list):
        for value in values:
            yield from _documentation(value)


def _plain(marked_up: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", marked_up))


def _licenses() -> list[str]:
    """The licenses of each package, without what another's say too."""
    seen: set[str] = set()
    documents = []
    for name in _LICENSED:
        files = importlib.metadata.distribution(name).files or []
        found = sorted(
            Path(str(file.locate())) for file in files if re.search("(?i)licen[sc]e", file.name)
        )
        texts = [file.read_text(encoding="utf-8") for file in found if file.suffix != ".py"]
        paragraphs = [p for text in texts for p in _distinct(text.split("\n\n"), seen)]
        documents.append("\n\n".join(paragraphs))
    return [text for text in documents if text]


def _distinct(paragraphs: Iterable[str], seen: set[str] | None = None) -> list[str]:
    """Prose, each paragraph once."""
    seen = set() if seen is None else seen
    kept = []
    for paragraph in paragraphs:
        joined = " ".join(paragraph.split())
        if len(joined) >= _MIN_PARAGRAPH and joined[0].isalpha() and joined not in seen:
            seen.add(joined)
            kept.append(joined)
    return kept
