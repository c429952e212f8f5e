"""Catalogs of tiny models whose runs are made in this process, with each solve counted."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import jobs.execute
from jobs.cli.main import main
from jobs.execute import Compute
from pipeline.executor.protocol import (
    Allocation,
    ComputeSpec,
    Handle,
    NodeRoom,
)
from pipeline.plan import read_plan
from pipeline.storage.object_store import ObjectStore, open_store
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.tiny_runs import TEXT, QuickWorker, source

WORK = ("solve", "quantize_alone")


class CountingCompute:
    """Computes in this process.

    Attributes:
        calls: of each method of the workers, all runs together.
        opened: how often it was opened.
        fail: raised by the next solve, once.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.opened = 0
        self.fail: BaseException | None = None

    @property
    def solves(self) -> int:
        return sum(self.calls[method] for method in WORK)

    @contextlib.contextmanager
    def open_compute(
        self, spec: ComputeSpec, source_url: str, run_url: str, **_: Any
    ) -> Iterator[Compute]:
        """Stands for `jobs.execute.open_compute`."""
        self.opened += 1
        workers = spec.workers or 1
        room = NodeRoom(workers=workers, memory_bytes=spec.memory_bytes or 1 << 40)
        allocation = Allocation(workers=workers, threads=spec.threads or 2, nodes=(room,))
        yield Compute(allocation, lambda: _LateExecutor(self, source_url, run_url))


class _LateExecutor(LocalExecutor):
    """Its worker is made at its first call, from the plan that is there then."""

    def __init__(self, at: CountingCompute, source_url: str, run_url: str) -> None:
        super().__init__([None])
        self._at = at
        self._urls = source_url, run_url
        self._made = False

    def work_on(self, run_url: str) -> None:
        self._urls = self._urls[0], run_url
        self._made = False

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        self._at.calls[method.__name__] += 1
        if method.__name__ in WORK and self._at.fail is not None:
            error, self._at.fail = self._at.fail, None
            raise error
        if not self._made:
            plan = read_plan(open_store(self._urls[1]))
            super().__init__([QuickWorker(plan, *self._urls)])
            self._made = True
        return super().submit(worker, method, *args, **kwargs)


class TinyCatalog:
    """A catalog in a folder, with its sources, texts and results.

    Attributes:
        folder: of the file.
        values: what the file says; `write` writes it.
        work: where it is done.
    """

    def __init__(self, folder: Path, work: CountingCompute) -> None:
        self.folder = folder
        self.work = work
        self.err = ""
        (folder / "texts").mkdir(parents=True)
        (folder / "texts" / "english.txt").write_text(TEXT)
        (folder / "texts" / "other.txt").write_text(TEXT[::-1])
        self.values: dict[str, Any] = {"root": "results", "models": [], "defaults": {}}

    def add(self, name: str, recipes: list[Any], **more: Any) -> None:
        """Add a model with a source of its own."""
        shutil.copytree(source(num_blocks=2), self.folder / "presets" / name)
        self.values["models"].append(
            {"name": name, "preset": f"presets/{name}", "recipes": recipes, **more}
        )

    def gptq(self, bits: int = 4, **more: Any) -> dict[str, Any]:
        """A recipe, written out, that calibrates on the catalog's own texts."""
        return {
            "name": f"gptq-w{bits}",
            "scheme": {"mode": "gptq", "weight_bits": bits, "group_size": 32},
            "calibration": {
                "texts": ["texts/english.txt"],
                "num_samples": 4,
                "sequence_length": 64,
            },
            **more,
        }

    @property
    def file(self) -> Path:
        path = self.folder / "catalog.yaml"
        path.write_text(yaml.safe_dump(self.values, sort_keys=False))
        return path

    @property
    def root(self) -> ObjectStore:
        return open_store(str(self.folder / "results"))

    def call(self, command: str, *arguments: object) -> tuple[int, Any]:
        """The exit code of a command, and the JSON that it printed."""
        out, err = io.StringIO(), io.StringIO()
        printed = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with printed[0], printed[1], pytest.raises(SystemExit) as ended:
            main([command, *map(str, arguments), "--json"])
        self.err = err.getvalue()
        assert "Traceback" not in self.err
        return int(ended.value.code or 0), json.loads(out.getvalue()) if out.getvalue() else None

    def nightly(self, *arguments: object) -> tuple[int, dict[str, dict[str, Any]]]:
        """The exit code, and what became of each run, by `model recipe`."""
        code, found = self.call("nightly", self.file, *arguments)
        return code, {f"{one['model']} {one['recipe']}": one for one in found or ()}

    def current(self, model: str, recipe: str) -> dict[str, Any]:
        """The content of a current.json, read as a reader would."""
        key = f"models/{model}/{recipe}/current.json"
        return json.loads(self.root.get(key))["content"]  # type: ignore[no-any-return]


@contextlib.contextmanager
def tiny_catalog(folder: Path) -> Iterator[TinyCatalog]:
    work = CountingCompute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.execute, "open_compute", work.open_compute)
        yield TinyCatalog(folder / "team", work)
