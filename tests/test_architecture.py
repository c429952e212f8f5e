"""The rules of the layout, checked on the syntax trees of our own packages.

- Layers: jobs → pipeline → quantizer, never backwards. The quantizer is pure.
- Doors: Ray is imported in pipeline/executor only, fsspec and S3 clients in pipeline/storage only,
  private Keras and KerasHub API in pipeline/model and quantizer/keras_format only.
- No import cycles between folders. A module at the root of a package counts as a folder of its own.
- No small module that only one other module imports: it belongs in that module. An __init__.py
  that is a docstring alone may be small.
- No catch-all module names, no code loaded as data, no swallowed exceptions.

Every import counts, at whatever depth: inside functions, and under TYPE_CHECKING too, because a
module whose types are needed is needed to understand the code. Each rule is also shown to fail.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("quantizer", "pipeline", "jobs")  # each may import itself and those before it

IMPURE = {
    **dict.fromkeys(("ray", "fsspec", "s3fs", "boto3", "botocore"), "does no I/O"),
    **dict.fromkeys(("keras_hub", "kagglehub", "huggingface_hub"), "knows layers, not models"),
    **dict.fromkeys(("rich", "tqdm", "typer", "logging"), "reports to its caller, not to people"),
}
EXECUTOR, STORAGE = "pipeline/executor", "pipeline/storage"
KERAS_DOORS = ("pipeline/model", "quantizer/keras_format")
DOORS = {
    "ray": (EXECUTOR,),
    **dict.fromkeys(("fsspec", "s3fs", "boto3", "botocore", "aiobotocore"), (STORAGE,)),
    **dict.fromkeys(("keras.src", "keras_hub.src"), KERAS_DOORS),
}
# Storage and executor may also need private attributes, of the one library that each wraps.
PRIVATE_ATTRIBUTES = (*KERAS_DOORS, EXECUTOR, STORAGE)
DOCUMENTED_DESPITE_UNDERSCORE = {("os", "_exit")}
FEWEST_LINES = 40

CODE_AS_DATA = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CATCH_ALL = {"util", "utils", "common", "helper", "helpers", "base", "misc"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
UNSAFE_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
EVERYTHING = {"Exception", "BaseException"}


# Rules for one file.


def file_violations(path: PurePath, tree: ast.AST) -> Iterator[str]:
    """Yield each rule that the file at `path`, relative to the root, breaks."""
    yield from _catch_all_names(path)
    yield from _hazards(tree)
    package = path.parts[0]
    if package in LAYERS:
        yield from _backward_imports(package, tree)
        yield from _bypassed_doors(path, tree)
        if not _is_inside(path, PRIVATE_ATTRIBUTES):
            yield from _private_access(tree)
    if package == "quantizer":
        yield from _impurities(tree)


def _catch_all_names(path: PurePath) -> Iterator[str]:
    for name in (*path.parts[:-1], path.stem):
        if name.lstrip("_") in CATCH_ALL:
            yield f"the name {name} does not say what is inside"


def _backward_imports(package: str, tree: ast.AST) -> Iterator[str]:
    above = {*LAYERS[LAYERS.index(package) + 1 :], "tests"}
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


def _bypassed_doors(path: PurePath, tree: ast.AST) -> Iterator[str]:
    used = {*_imported_names(tree), *_dotted_names(tree)}
    for library, folders in DOORS.items():
        uses_it = any(name == library or name.startswith(f"{library}.") for name in used)
        if uses_it and not _is_inside(path, folders):
            yield f"{library} is used outside {' and '.join(folders)}"


def _private_access(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (
                owner,
                name,
            ) in DOCUMENTED_DESPITE_UNDERSCORE:
                pass
            case ast.Attribute(value=owner, attr=name) if _is_private(name):
                yield f"line {node.lineno}: private attribute {ast.unparse(owner)}.{name}"
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr" | "attrgetter"),
                args=arguments,
            ):
                for argument in arguments:
                    match argument:
                        case ast.Constant(value=str(name)) if any(
                            map(_is_private, name.split("."))
                        ):
                            yield f"line {node.lineno}: private attribute {name}"
            case ast.Attribute(
                value=ast.Name(id="object"), attr="__setattr__" | "__delattr__" as name
            ) if not _is_called_on_self(tree, node):
                yield f"line {node.lineno}: object.{name} bypasses another object's own checks"
            case ast.ImportFrom(module=module, names=names):
                for alias in names:
                    if _is_private(alias.name):
                        yield f"line {node.lineno}: private name {module}.{alias.name}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _is_called_on_self(tree: ast.AST, function: ast.Attribute) -> bool:
    """Whether the function is called with `self`, as a frozen dataclass's __post_init__ does."""
    return any(
        isinstance(node, ast.Call)
        and node.func is function
        and bool(node.args)
        and isinstance(node.args[0], ast.Name)
        and node.args[0].id == "self"
        for node in ast.walk(tree)
    )


def _hazards(tree: ast.AST) -> Iterator[str]:
    for name in _imported_packages(tree):
        if name in CODE_AS_DATA:
            yield f"{name} can run code from the data it reads"
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" | "__import__" as name)):
                yield f"{name}()"
            case ast.Attribute(value=ast.Name(id="yaml"), attr=name) if name in UNSAFE_YAML:
                yield f"yaml.{name} constructs arbitrary objects"
            case ast.ImportFrom(module="yaml", names=names):
                for alias in names:
                    if alias.name in UNSAFE_YAML:
                        yield f"yaml.{alias.name} constructs arbitrary objects"
            case ast.keyword(arg="allow_pickle", value=value) if not _is_false(value):
                yield "allow_pickle can run code from the data it reads"
            case ast.ExceptHandler(type=exception, body=body) if _catches_all(exception):
                if all(isinstance(step, ast.Pass | ast.Continue | ast.Expr) for step in body):
                    yield "an exception of any type is swallowed"
            case ast.Call(
                func=ast.Name(id="suppress") | ast.Attribute(attr="suppress"), args=exceptions
            ) if any(map(_catches_all, exceptions)):
                yield "an exception of any type is swallowed"


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def _catches_all(exception: ast.expr | None) -> bool:
    match exception:
        case None:
            return True
        case ast.Tuple(elts=exceptions):
            return any(map(_catches_all, exceptions))
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in EVERYTHING
    return False


def _is_inside(path: PurePath, folders: Iterable[str]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of each import, at whatever depth.

    `from a import b` yields a.b, which is a module or something in module a. Relative imports are
    not followed: ruff bans them.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0, names=names):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module


def _imported_packages(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level package of each imported module."""
    names = dict.fromkeys(name.partition(".")[0] for name in _imported_names(tree))
    yield from names


def _dotted_names(tree: ast.AST) -> Iterator[str]:
    """Yield each `a.b` of the code: `keras.src.x` needs no import of its own."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr="src"):
                yield f"{owner}.src"


# Rules for all files together.


Imports = Mapping[PurePath, frozenset[PurePath]]


def imports_between(trees: Mapping[PurePath, ast.AST]) -> Imports:
    """Return which of our files each of our files imports."""
    found = {}
    for path, tree in trees.items():
        files = {_file_of(name, trees) for name in _imported_names(tree)}
        found[path] = frozenset(file for file in files if file is not None and file != path)
    return found


def _file_of(name: str, files: Iterable[PurePath]) -> PurePath | None:
    """Return the file that defines a dotted name, if it is ours."""
    parts = name.split(".")
    for end in (len(parts), len(parts) - 1):  # a module, or something in one
        for path in (
            PurePath(*parts[:end]).with_suffix(".py") if end else PurePath(),
            PurePath(*parts[:end], "__init__.py"),
        ):
            if path in files:
                return path
    return None


def folder_cycles(imports: Imports) -> Iterator[str]:
    """Yield each set of folders that import one another, and the imports that make it so."""
    edges: dict[PurePath, set[PurePath]] = {}
    for path, imported in imports.items():
        edges.setdefault(_folder(path), set()).update(map(_folder, imported))
    reachable = {folder: _reachable(folder, edges) for folder in edges}
    seen: set[PurePath] = set()
    for folder in sorted(edges):
        cycle = {other for other in reachable[folder] if folder in reachable[other]}
        if len(cycle) < 2 or folder in seen:
            continue
        seen |= cycle
        between = [
            f"{path} → {other}"
            for path, imported in sorted(imports.items())
            for other in sorted(imported)
            if _folder(path) != _folder(other) and {_folder(path), _folder(other)} <= cycle
        ]
        yield f"{', '.join(sorted(map(str, cycle)))} import one another: {'; '.join(between)}"


def _folder(path: PurePath) -> PurePath:
    """Return a file's folder, or for a module at a package's root the module itself."""
    return path.parent if len(path.parts) > 2 else path.with_suffix("")


def _reachable(start: PurePath, edges: Mapping[PurePath, set[PurePath]]) -> set[PurePath]:
    found: set[PurePath] = set()
    waiting = [start]
    while waiting:
        for folder in edges.get(waiting.pop(), ()):
            if folder not in found:
                found.add(folder)
                waiting.append(folder)
    return found


def small_modules(imports: Imports, num_lines: Mapping[PurePath, int]) -> Iterator[str]:
    """Yield each short file, of those in `num_lines`, that exactly one other file imports."""
    for path, lines in sorted(num_lines.items()):
        importers = [other for other, imported in imports.items() if path in imported]
        if lines < FEWEST_LINES and len(importers) == 1:
            yield f"{path} has {lines} lines and only {importers[0]} imports it: merge them"


def is_docstring(path: PurePath, tree: ast.AST) -> bool:
    """Whether the file is a package's __init__.py that holds a docstring alone."""
    return path.name == "__init__.py" and len(list(ast.iter_child_nodes(tree))) <= 1


# The rules hold.


@functools.cache
def sources() -> dict[PurePath, str]:
    """Read the files of our packages; their paths are relative to the root."""
    files = [file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]
    return {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in files}


@functools.cache
def trees() -> dict[PurePath, ast.AST]:
    return {path: ast.parse(source) for path, source in sources().items()}


def test_every_layer_is_checked() -> None:
    assert set(LAYERS) == {path.parts[0] for path in sources()}


@pytest.mark.parametrize("path", sources(), ids=str)
def test_file_keeps_the_rules(path: PurePath) -> None:
    assert list(file_violations(path, trees()[path])) == []


def test_no_folders_import_one_another() -> None:
    assert list(folder_cycles(imports_between(trees()))) == []


def test_no_small_module_has_a_single_importer() -> None:
    num_lines = {
        path: len(source.splitlines())
        for path, source in sources().items()
        if not is_docstring(path, trees()[path])
    }
    assert list(small_modules(imports_between(trees()), num_lines)) == []


def test_no_test_module_has_a_catch_all_name() -> None:
    tests = [file.relative_to(ROOT) for file in (ROOT / "tests").rglob("*.py")]
    assert [violation for path in tests for violation in _catch_all_names(path)] == []


# Each rule can fail.


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("quantizer/gptq.py", "import jobs.cli.main", "quantizer imports jobs"),
        ("quantizer/gptq.py", "def f():\n    from pipeline import run", "imports pipeline"),
        ("quantizer/gptq.py", "import_module('pipeline.run.driver')", "imports pipeline"),
        ("quantizer/gptq.py", "from tests.reference import gptq", "imports tests"),
        ("pipeline/run.py", "from jobs import catalog", "pipeline imports jobs"),
        ("quantizer/keras_format/a.py", "if True:\n    import keras_hub as hub", "imports keras_h"),
        ("quantizer/gptq.py", "from tqdm.auto import tqdm", "imports tqdm"),
        ("quantizer/gptq.py", "import rich.progress", "imports rich"),
        ("quantizer/gptq.py", "seed = os.environ['SEED']", "reads os.environ"),
        ("quantizer/gptq.py", "seed = os.getenv('SEED')", "reads os.getenv"),
        ("quantizer/gptq.py", "from os import environ", "reads os.environ"),
        ("jobs/metrics.py", "from ray.util.metrics import Gauge", "ray is used outside"),
        ("pipeline/run/driver.py", "def f():\n    import ray", "ray is used outside"),
        ("pipeline/run/driver.py", "import_module('ray')", "ray is used outside"),
        ("pipeline/weights/hdf5.py", "from fsspec.core import open", "fsspec is used outside"),
        ("pipeline/executor/ray.py", "import s3fs", "s3fs is used outside"),
        ("jobs/cli.py", "from botocore.exceptions import ClientError", "botocore is used outside"),
        ("pipeline/worker/a.py", "from keras.src.saving import saving_lib", "keras.src is used"),
        ("pipeline/worker/a.py", "from keras import src", "keras.src is used"),
        ("pipeline/worker/a.py", "keras.src.backend.config()", "keras.src is used"),
        ("pipeline/storage/a.py", "import keras_hub.src.utils", "keras_hub.src is used"),
        ("pipeline/worker/a.py", "layer._dtype_policy = policy", "layer._dtype_policy"),
        ("pipeline/worker/a.py", "block.get(0)._inbound_nodes[0]", "block.get(0)._inbound_nodes"),
        ("pipeline/worker/a.py", "getattr(layer, '_kernel')", "attribute _kernel"),
        ("pipeline/worker/a.py", "attrgetter('block._kernel.value')", "attribute block._kernel"),
        ("pipeline/worker/a.py", "object.__setattr__(layer, 'call', f)", "object.__setattr__"),
        ("pipeline/worker/a.py", "from keras.saving import _load", "private name keras.saving._lo"),
        ("jobs/utils.py", "", "utils does not say"),
        ("jobs/_helpers.py", "", "_helpers does not say"),
        ("pipeline/common/store.py", "", "common does not say"),
        ("jobs/cli.py", "import pickle", "pickle can run"),
        ("jobs/cli.py", "from cloudpickle import loads", "cloudpickle can run"),
        ("jobs/cli.py", "np.load(file, allow_pickle=True)", "allow_pickle can run"),
        ("jobs/cli.py", "eval('1')", "eval()"),
        ("jobs/cli.py", "yaml.load(text, yaml.Loader)", "yaml.load constructs"),
        ("jobs/cli.py", "from yaml import unsafe_load", "yaml.unsafe_load constructs"),
        ("jobs/cli.py", "try:\n    f()\nexcept Exception:\n    pass", "swallowed"),
        ("jobs/cli.py", "try:\n    f()\nexcept (OSError, BaseException):\n    ...", "swallowed"),
        (
            "jobs/cli.py",
            "for x in y:\n    try:\n        f()\n    except:\n        continue",
            "swal",
        ),
        ("jobs/cli.py", "with contextlib.suppress(Exception):\n    f()", "swallowed"),
    ],
)
def test_each_rule_for_a_file_can_fail(path: str, source: str, expected: str) -> None:
    [violation] = file_violations(PurePath(path), ast.parse(source))
    assert expected in violation


@pytest.mark.parametrize("library", ["ray", "fsspec", "s3fs", "boto3", "botocore"])
def test_the_quantizer_uses_no_cluster_and_no_store(library: str) -> None:
    tree = ast.parse(f"import {library}")
    violations = list(file_violations(PurePath("quantizer/gptq.py"), tree))
    assert f"quantizer imports {library}, but it does no I/O" in violations


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "quantizer/gptq.py",
            "import jax\nfrom quantizer.qparams import quantize\nfrom . import grid",
        ),
        ("pipeline/run.py", "import keras_hub\nfrom quantizer import gptq"),
        ("pipeline/executor/ray_cluster.py", "import ray\nray._private.worker"),
        ("pipeline/storage/remote_store.py", "import fsspec, botocore\nfilesystem._exists(key)"),
        ("pipeline/model/blocks.py", "from keras.src import x\nblock._inbound_nodes[0]"),
        ("quantizer/keras_format/layers.py", "object.__setattr__(layer, 'call', f)"),
        ("pipeline/run.py", "self._lock\ncls._open\nvalue.__class__\nos._exit(1)\ngetattr(x, 'y')"),
        ("pipeline/run.py", "object.__setattr__(self, 'codes', codes)"),
        ("jobs/cli.py", "import os, rich\nfrom pipeline import run\nhome = os.environ['HOME']"),
        ("jobs/cli.py", "yaml.safe_load(text)\nre.compile('x')\nmodel.eval()"),
        ("jobs/cli.py", "np.load(file, allow_pickle=False)"),
        ("jobs/cli.py", "try:\n    f()\nexcept FileExistsError:\n    pass"),
        ("jobs/cli.py", "try:\n    f()\nexcept Exception:\n    close()\n    raise"),
        ("jobs/cli.py", "with suppress(FileNotFoundError):\n    f()"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert list(file_violations(PurePath(path), ast.parse(source))) == []


def imports_of(files: Mapping[str, str]) -> Imports:
    return imports_between({PurePath(path): ast.parse(text) for path, text in files.items()})


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        (
            {
                "pipeline/a/x.py": "from pipeline.b import y",
                "pipeline/b/y.py": "",
                "pipeline/b/z.py": "def f():\n    from pipeline.a.x import g",
            },
            "pipeline/a, pipeline/b",
        ),
        (
            {
                "pipeline/a/x.py": "import pipeline.plan",
                "pipeline/plan.py": "if TYPE_CHECKING:\n    from pipeline.a.x import X",
            },
            "pipeline/a, pipeline/plan",
        ),
        (
            {
                "jobs/a/x.py": "from jobs import b",
                "jobs/b/__init__.py": "from jobs.c.z import Z",
                "jobs/c/z.py": "import_module('jobs.a.x')",
            },
            "jobs/a, jobs/b, jobs/c",
        ),
    ],
)
def test_a_cycle_between_folders_is_found(files: dict[str, str], cycle: str) -> None:
    [violation] = folder_cycles(imports_of(files))
    assert violation.startswith(f"{cycle} import one another")


def test_imports_in_one_direction_and_inside_a_folder_are_no_cycle() -> None:
    files = {
        "pipeline/a/x.py": "from pipeline.a.w import W\nfrom pipeline.b.y import Y",
        "pipeline/a/w.py": "from pipeline.a import x\nfrom pipeline.plan import Plan",
        "pipeline/b/y.py": "from pipeline.plan import Plan",
        "pipeline/plan.py": "import jax",
    }
    assert list(folder_cycles(imports_of(files))) == []


@pytest.mark.parametrize(
    ("num_lines", "other", "violations"),
    [
        (39, "", ["jobs/a.py has 39 lines and only jobs/b.py imports it: merge them"]),
        (40, "", []),
        (39, "from jobs.a import A", []),
    ],
)
def test_a_small_module_with_a_single_importer_is_found(
    num_lines: int, other: str, violations: list[str]
) -> None:
    imports = imports_of({"jobs/a.py": "", "jobs/b.py": "import jobs.a", "jobs/c.py": other})
    counts = dict.fromkeys(imports, num_lines)
    assert list(small_modules(imports, counts)) == violations
