"""The rules of the layout, read off the syntax trees of our own packages.

jobs → pipeline → quantizer, never backwards; the quantizer is pure; no file is a drawer for odds
and ends; nothing runs data as code or swallows an error. Each rule is first shown to fail.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("quantizer", "pipeline", "jobs")  # each may import itself and those before it

IMPURE = {
    **dict.fromkeys(("ray", "fsspec", "s3fs", "boto3", "botocore"), "runs and stores nothing"),
    **dict.fromkeys(("keras_hub", "kagglehub", "huggingface_hub"), "knows layers, not models"),
    **dict.fromkeys(("rich", "tqdm", "typer", "logging"), "reports to its caller, not to people"),
}
CODE_AS_DATA = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
DRAWERS = {"util", "utils", "common", "helper", "helpers", "base", "misc"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
UNSAFE_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
EVERYTHING = {"Exception", "BaseException"}


def faults(path: Path, source: str) -> list[str]:
    """Return what the file at `path`, relative to the root, does against the rules."""
    tree = ast.parse(source)
    package = path.parts[0]
    found = [*_drawers(path), *_hazards(tree)]
    if package in LAYERS:
        found += _backward_imports(package, tree)
    if package == "quantizer":
        found += _impurities(tree)
    return found


def _drawers(path: Path) -> Iterator[str]:
    for name in (*path.parts[:-1], path.stem):
        if name.lstrip("_") in DRAWERS:
            yield f"{name} says nothing about what it holds"


def _backward_imports(package: str, tree: ast.AST) -> Iterator[str]:
    above = set(LAYERS[LAYERS.index(package) + 1 :]) | {"tests"}
    for name in _imported_packages(tree):
        if name in above:
            yield f"{package} imports {name}"


def _impurities(tree: ast.AST) -> Iterator[str]:
    for name in _imported_packages(tree):
        if name in IMPURE:
            yield f"quantizer imports {name}, but it {IMPURE[name]}"
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name in ENVIRONMENT:
                yield f"quantizer reads os.{name}"
            case ast.ImportFrom(module="os", names=names):
                for alias in names:
                    if alias.name in ENVIRONMENT:
                        yield f"quantizer reads os.{alias.name}"


def _hazards(tree: ast.AST) -> Iterator[str]:
    for name in _imported_packages(tree):
        if name in CODE_AS_DATA:
            yield f"{name} runs what it reads"
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" | "__import__" as name)):
                yield f"{name}()"
            case ast.Attribute(value=ast.Name(id="yaml"), attr=name) if name in UNSAFE_YAML:
                yield f"yaml.{name} builds any object it is told to"
            case ast.ImportFrom(module="yaml", names=names):
                for alias in names:
                    if alias.name in UNSAFE_YAML:
                        yield f"yaml.{alias.name} builds any object it is told to"
            case ast.keyword(arg="allow_pickle", value=value) if not _is_false(value):
                yield "allow_pickle runs what it reads"
            case ast.ExceptHandler(type=kind, body=body) if _catches_all(kind):
                if all(isinstance(step, ast.Pass | ast.Continue | ast.Expr) for step in body):
                    yield "an exception of any kind is swallowed"
            case ast.Call(
                func=ast.Name(id="suppress") | ast.Attribute(attr="suppress"), args=kinds
            ) if any(map(_catches_all, kinds)):
                yield "an exception of any kind is swallowed"


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def _catches_all(kind: ast.expr | None) -> bool:
    match kind:
        case None:
            return True
        case ast.Tuple(elts=kinds):
            return any(map(_catches_all, kinds))
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in EVERYTHING
    return False


def _imported_packages(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level package of each import, at whatever depth; relative ones stay inside."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.partition(".")[0]
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module.partition(".")[0]


def _sources() -> list[Path]:
    """List the files of our packages, relative to the root."""
    files = [file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]
    return [file.relative_to(ROOT) for file in files]


def test_every_layer_that_exists_is_walked() -> None:
    assert {"quantizer", "jobs"} <= {path.parts[0] for path in _sources()}


@pytest.mark.parametrize("path", _sources(), ids=str)
def test_source_keeps_the_rules(path: Path) -> None:
    assert faults(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_no_test_module_is_a_drawer() -> None:
    tests = [file.relative_to(ROOT) for file in (ROOT / "tests").rglob("*.py")]
    assert [fault for path in tests for fault in _drawers(path)] == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("quantizer/gptq.py", "import jobs.cli.main", "quantizer imports jobs"),
        ("quantizer/gptq.py", "def f():\n    from pipeline import run", "imports pipeline"),
        ("quantizer/gptq.py", "import_module('pipeline.run.driver')", "imports pipeline"),
        ("quantizer/gptq.py", "from tests.reference import gptq", "imports tests"),
        ("pipeline/run.py", "from jobs import catalog", "pipeline imports jobs"),
        ("quantizer/gptq.py", "import ray", "imports ray"),
        ("quantizer/gptq.py", "from fsspec.core import open", "imports fsspec"),
        ("quantizer/gptq.py", "if True:\n    import keras_hub as hub", "imports keras_hub"),
        ("quantizer/gptq.py", "from tqdm.auto import tqdm", "imports tqdm"),
        ("quantizer/gptq.py", "import rich.progress", "imports rich"),
        ("quantizer/gptq.py", "seed = os.environ['SEED']", "reads os.environ"),
        ("quantizer/gptq.py", "seed = os.getenv('SEED')", "reads os.getenv"),
        ("quantizer/gptq.py", "from os import environ", "reads os.environ"),
        ("jobs/utils.py", "", "utils says nothing"),
        ("jobs/_helpers.py", "", "_helpers says nothing"),
        ("pipeline/common/store.py", "", "common says nothing"),
        ("jobs/cli.py", "import pickle", "pickle runs"),
        ("jobs/cli.py", "from cloudpickle import loads", "cloudpickle runs"),
        ("jobs/cli.py", "np.load(file, allow_pickle=True)", "allow_pickle runs"),
        ("jobs/cli.py", "eval('1')", "eval()"),
        ("jobs/cli.py", "yaml.load(text, yaml.Loader)", "yaml.load builds"),
        ("jobs/cli.py", "from yaml import unsafe_load", "yaml.unsafe_load builds"),
        ("jobs/cli.py", "try:\n    f()\nexcept Exception:\n    pass", "swallowed"),
        (
            "jobs/cli.py",
            "try:\n    f()\nexcept (OSError, BaseException) as e:\n    ...",
            "swallowed",
        ),
        (
            "jobs/cli.py",
            "for x in y:\n    try:\n        f()\n    except:\n        continue",
            "swallow",
        ),
        ("jobs/cli.py", "with contextlib.suppress(Exception):\n    f()", "swallowed"),
    ],
)
def test_each_rule_can_fail(path: str, source: str, expected: str) -> None:
    [fault] = faults(Path(path), source)
    assert expected in fault


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "quantizer/gptq.py",
            "import jax\nfrom quantizer.qparams import quantize\nfrom . import grid",
        ),
        ("pipeline/run.py", "import ray, fsspec, keras_hub\nfrom quantizer import gptq"),
        ("jobs/cli.py", "import os, rich\nfrom pipeline import run\nhome = os.environ['HOME']"),
        ("jobs/cli.py", "yaml.safe_load(text)\nre.compile('x')\nmodel.eval()"),
        ("jobs/cli.py", "np.load(file, allow_pickle=False)"),
        ("jobs/cli.py", "try:\n    f()\nexcept FileExistsError:\n    pass"),
        ("jobs/cli.py", "try:\n    f()\nexcept Exception:\n    close()\n    raise"),
        ("jobs/cli.py", "with suppress(FileNotFoundError):\n    f()"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert faults(Path(path), source) == []
