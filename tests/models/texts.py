"""English prose that ships with every Python: its manual and its standard library's docstrings.

Each topic of the manual (`pydoc_data`) and each module is a document. Topics contain one another
and docstrings are copied, so repeated paragraphs are dropped: no text is in both calibration and
evaluation. Every fourth document is for evaluation.

The text is the same in every process of one interpreter. Another release of Python, even a patch
release or a distribution's build, has other text, so numbers are comparable within one only.

    python -m tests.models.texts FOLDER

Texts unlike these come from packages of Debian (`tests.models.debian`): `novels`, `documentation`
and `code`. No test needs them.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tests.models.debian import package_files
from tests.models.r_strings import read_database

_MIN_PARAGRAPH = 100  # characters; shorter ones are titles, code and tables
_MIN_DOCUMENT = 400
_EVALUATION_EVERY = 4
_PIECE = 4000  # characters, about what the manual's documents have
_EVALUATION_BOOKS = ("EMMA", "Persuasion")


def write_texts(folder: str | Path) -> tuple[Path, Path]:
    """Write calibration.jsonl and evaluation.jsonl, with a document per line: {"text": …}."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "calibration.jsonl", folder / "evaluation.jsonl"
    for path, documents in zip(
        paths, (calibration_documents(), evaluation_documents()), strict=True
    ):
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def calibration_documents() -> list[str]:
    """Three of every four documents, in the order of their names."""
    return [text for place, text in enumerate(_documents()) if place % _EVALUATION_EVERY]


def evaluation_documents() -> list[str]:
    """One of every four documents, in the order of their names."""
    return list(_documents()[::_EVALUATION_EVERY])


def novels(cache: Path, *, for_calibration: bool = False) -> list[str]:
    """Jane Austen's novels in pieces: Emma and Persuasion, or the other four for calibration."""
    [database] = package_files("r-cran-janeaustenr", r"/data/Rdata\.rdb$", cache).values()
    books = [
        lines
        for lines in read_database(database)
        if (lines[0] in _EVALUATION_BOOKS) != for_calibration
    ]
    expected = 4 if for_calibration else len(_EVALUATION_BOOKS)
    if len(books) != expected:
        raise ValueError(f"r-cran-janeaustenr: {len(books)} novels where {expected} are known")
    return [piece for lines in books for piece in _pieces(lines)]


def documentation(cache: Path) -> list[str]:
    """Flask's manual, a page a document, as its authors wrote it (reStructuredText)."""
    pages = package_files("python-flask-doc", r"/_sources/.*\.rst\.txt$", cache)
    return _long_enough(pages)


def code(cache: Path) -> list[str]:
    """Source files in turn: NetworkX in Python, Eigen in C++."""
    python = _long_enough(package_files("python3-networkx", r"/algorithms/.*\.py$", cache))
    cpp = _long_enough(package_files("libeigen3-dev", r"/Eigen/src/.*\.h$", cache))
    return [file for pair in zip(python, cpp, strict=False) for file in pair]


def _long_enough(files: dict[str, bytes]) -> list[str]:
    texts = [content.decode("utf-8", "replace") for content in files.values()]
    return [text for text in texts if len(text) >= _MIN_DOCUMENT]


def _pieces(lines: list[str]) -> Iterator[str]:
    """Join lines to paragraphs, and those to pieces of at least `_PIECE` characters."""
    piece: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        joined = _joined(paragraph)
        if joined:
            piece.append(joined)
        if sum(map(len, piece)) >= _PIECE:
            yield "\n\n".join(piece)
            piece = []


@functools.cache
def _documents() -> tuple[str, ...]:
    sources = {f"topic {name}": text.split("\n\n") for name, text in topics.items()}
    sources |= {f"module {name}": paragraphs for name, paragraphs in _docstrings()}
    # Larger topics contain smaller ones: the larger keeps the paragraphs that they share.
    by_size = sorted(sources, key=lambda name: (-sum(map(len, sources[name])), name))
    seen: set[str] = set()
    documents = {}
    for name in by_size:
        kept = []
        for paragraph in map(_joined, sources[name]):
            if _is_prose(paragraph) and paragraph not in seen:
                kept.append(paragraph)
                seen.add(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= _MIN_DOCUMENT:
            documents[name] = text
    return tuple(documents[name] for name in sorted(documents))


def _docstrings() -> Iterator[tuple[str, list[str]]]:
    """Yield the name and docstrings of each single-file module, without importing it."""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(file.read_bytes())
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        yield file.stem, [paragraph for text in texts if text for paragraph in text.split("\n\n")]


def _joined(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _is_prose(paragraph: str) -> bool:
    return len(paragraph) >= _MIN_PARAGRAPH and paragraph[0].isalpha() and ">>>" not in paragraph


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write the two files")
    for path in write_texts(parser.parse_args().folder):
        print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} documents")


if __name__ == "__main__":
    main()
