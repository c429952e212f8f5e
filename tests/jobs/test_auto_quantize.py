"""A recipe that names a size is quantized at every width, and gives the best of that size."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import jobs.auto_quantize
import jobs.compose
import jobs.quantize
import pipeline.storage.memory_store
import pipeline.worker.worker
from jobs.execute import Compute, DriverOptions
from pipeline.artifact.verification import ask_stock
from pipeline.composition.auto_run import AutoRun
from pipeline.composition.decision import Decision
from pipeline.executor.protocol import Allocation, ComputeSpec, Handle
from pipeline.plan import read_plan
from pipeline.run.records import ARTIFACT_PREFIX, MANIFEST_KEY, PartRecord, file_key, record_key
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.streamed_model import artifact_model
from tests.faults.killing import Killed, Killer, kill, killing_memory
from tests.faults.test_kill_statistics import NoLease
from tests.integration.quantized import batch_of, distance
from tests.integration.test_cli_quantize import Command
from tests.pipeline.float_runs import lasting_all
from tests.pipeline.local_executor import LocalExecutor
from tests.pipeline.presets import shared_preset
from tests.pipeline.tiny_runs import QuickWorker, model_state, text_file

NUM_BLOCKS = 2
PARTS = range(1, NUM_BLOCKS + 1)
QUICK_TO_COMPILE = {"scale_search": False, "refinement_sweeps": 0}
CHOICE_PLAN = re.compile(r"choices/w\d/plan\.json")
_fresh = itertools.count()


def source() -> Path:
    return shared_preset("Llama3", num_blocks=NUM_BLOCKS)


class Workers(LocalExecutor):
    """Workers in this process, made at the first call of one, from the plan that is there then."""

    def __init__(self, calls: Counter[str], number: int, source_url: str, run_url: str) -> None:
        super().__init__([None] * number)
        self._calls = calls
        self._urls = source_url, run_url
        self._made = False

    def work_on(self, run_url: str) -> None:
        self._urls = self._urls[0], run_url
        self._made = False

    def submit(
        self, worker: int, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Handle[Any]:
        self._calls[method.__name__] += 1
        if not self._made:
            plan = read_plan(open_store(self._urls[1]))
            super().__init__([QuickWorker(plan, *self._urls) for _ in self._workers])
            self._made = True
        return super().submit(worker, method, *args, **kwargs)


class AutoCommand(Command):
    """The command line, computing in this process.

    Attributes:
        calls: of each method of the workers.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(capsys)
        self.calls: Counter[str] = Counter()
        self.opened = 0

    @contextlib.contextmanager
    def open_compute(
        self, spec: ComputeSpec, source_url: str, run_url: str, **_: Any
    ) -> Iterator[Compute]:
        self.opened += 1
        workers = spec.workers or 1
        allocation = Allocation(workers=workers, threads=1)
        yield Compute(allocation, lambda: Workers(self.calls, workers, source_url, run_url))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> AutoCommand:
    command = AutoCommand(capsys)
    for module in (jobs.auto_quantize, jobs.compose, jobs.quantize):
        monkeypatch.setattr(module, "open_compute", command.open_compute)
    monkeypatch.setattr(
        pipeline.worker.worker, "ModelState", lambda plan, url: model_state(plan.to_json(), url)
    )
    return command


def recipe_file(folder: Path, **scheme: Any) -> Path:
    given = {"target_bits": 100, "choices": [2, 4], "measure_windows": 4, "group_size": 16}
    given |= {"by_layers": False}
    if "target_bytes" in scheme:
        del given["target_bits"]
    recipe = {
        "name": "auto",
        "scheme": {"mode": "auto"} | given | QUICK_TO_COMPILE | scheme,
        "calibration": {"texts": [str(text_file())], "num_samples": 8, "sequence_length": 64},
    }
    path = folder / "auto.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def quantize(command: AutoCommand, out: ObjectStore, recipe: Path, *arguments: object) -> int:
    given = ("quantize", source(), "--recipe", recipe, "--output", out.root_url, *arguments)
    return command(*map(str, given))


def fresh() -> ObjectStore:
    return open_store(f"memory://auto/{next(_fresh)}")


def choice(out: ObjectStore, bits: int) -> ObjectStore:
    return open_store(f"{out.root_url}/choices/w{bits}")


BETWEEN = 8.9
"""Bits a weight: of the two blocks one has room for four bits."""


def picked(out: ObjectStore) -> tuple[int, ...]:
    return Decision.read(out, Decision.key).picked


def test_one_command_gives_what_composing_its_choices_gives(
    command: AutoCommand, tmp_path: Path
) -> None:
    """The model runs once for all widths; each block is as its choice's run has it; the choices
    serve other targets, until they are deleted, and the result outlives them."""
    out, recipe = fresh(), recipe_file(tmp_path, target_bits=BETWEEN)
    assert quantize(command, out, recipe, "--json") == 0
    summary = json.loads(command.out)
    assert command.calls["commit_sums"] == NUM_BLOCKS
    assert sorted(picked(out)) == [0, 1]
    assert "chosen" in command.err
    plan = read_plan(out)
    assert plan.recipe.name == "auto"
    assert summary["decision"]["picked"] == list(picked(out))
    for part, number in zip(PARTS, picked(out), strict=True):
        run = choice(out, (2, 4)[number])
        assert out.get(file_key(part)) == run.get(file_key(part))
    limit = BETWEEN * sum(part.num_weights for part in plan.parts[1:]) / 8
    assert sum(PartRecord.read(out, record_key(part)).size_bytes for part in PARTS) <= limit

    composed = fresh()
    runs = [choice(out, bits).root_url for bits in (2, 4)]
    target = ("--target-bits", BETWEEN, "--measure-windows", 4, "--output", composed.root_url)
    assert command("compose", *runs, *map(str, target)) == 0
    assert picked(composed) == picked(out)
    assert all(composed.get(file_key(part)) == out.get(file_key(part)) for part in (0, *PARTS))

    made, computed = lasting_all(out), sum(command.calls.values())
    assert command("resume", out.root_url) == 0
    assert quantize(command, out, recipe) == 0
    assert lasting_all(out) == made
    assert sum(command.calls.values()) == computed
    assert quantize(command, out, recipe_file(tmp_path, target_bits=9.0)) == 2
    assert "auto.json is of another recipe or source (other target)" in command.complaint

    assert command("gc", out.root_url) == 0
    assert "choice of a finished result" not in command.err
    assert command("gc", out.root_url, "--choices", "--delete") == 0
    assert not [key for key in out.list() if key.startswith(("choices/", "statistics/"))]
    kept = {key: x for key, x in made.items() if not key.startswith(("choices/", "statistics/"))}
    assert lasting_all(out) == kept
    assert command("resume", out.root_url) == 0


def test_a_dry_run_tells_sizes_and_a_target_out_of_reach_is_refused_before_anything_is_written(
    command: AutoCommand, tmp_path: Path
) -> None:
    out = fresh()
    assert quantize(command, out, recipe_file(tmp_path, target_bits=5), "--dry-run", "--json") == 0
    told = json.loads(command.out)
    assert [one["recipe"] for one in told["choices"]] == ["auto-w2", "auto-w4"]
    small, large = told["choices"]
    assert 0 < small["num_bytes"] < large["num_bytes"]
    assert told["fitting"] == ["auto-w2"]
    assert told["statistics_bytes"] > 0
    for arguments in ((), ("--dry-run",)):
        too_small = recipe_file(tmp_path, target_bits=2.5)
        assert quantize(command, out, too_small, *arguments) == 2
        assert "target_bits: 2.5: the blocks at 2 bits, the smallest choice" in command.complaint
    assert quantize(command, out, recipe_file(tmp_path, target_bytes=9000)) == 2
    assert "target_bytes: 9000: the blocks at 2 bits" in command.complaint
    assert quantize(command, out, recipe_file(tmp_path), "--export", "gptq") == 2
    assert "holds one width for all layers" in command.complaint
    assert not out.list()
    assert not command.calls


@pytest.mark.exhaustive
def test_a_target_that_files_turn_out_too_large_for_costs_the_smallest_choice_alone(
    command: AutoCommand, tmp_path: Path
) -> None:
    out, recipe = fresh(), recipe_file(tmp_path, target_bits=5)
    assert quantize(command, out, recipe) == 2
    assert "target_bits: 5.0: the blocks at 2 bits, the smallest choice, take 8.1" in (
        command.complaint
    )
    assert choice(out, 2).exists(MANIFEST_KEY)
    assert not choice(out, 4).exists(MANIFEST_KEY)
    assert command("resume", out.root_url) == 2  # as before
    assert command("verify", out.root_url) == 4
    assert f"finish it with quantfleet resume {out.root_url}" in command.complaint
    assert command("evaluate", out.root_url, "--evaluate-on", str(text_file())) == 2
    assert f"finish it with quantfleet resume {out.root_url}" in command.complaint


@pytest.mark.exhaustive
def test_kills_anywhere_leave_the_same_bytes(
    command: AutoCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_file(tmp_path, target_bits=BETWEEN)
    whole, out, kills = fresh(), fresh(), 0
    assert quantize(command, whole, recipe) == 0
    monkeypatch.setattr(DriverOptions, "acquire_lease", lambda *_: NoLease())
    for number in range(3, 1_000, 9):
        killer = Killer(end=kill, at=number, after=bool(number % 2))
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.storage.memory_store, "MemoryBackend", killing_memory(killer))
            try:
                if out.exists(AutoRun.key):
                    assert command("resume", out.root_url) == 0
                else:
                    assert quantize(command, out, recipe) == 0
                break
            except Killed:
                kills += 1
    assert kills > 8
    # Choices' plans name the folder of their statistics, which is no part of their digests.
    plans = [[read_plan(choice(x, bits)).digest for bits in (2, 4)] for x in (whole, out)]
    assert plans[0] == plans[1]
    found, expected = (
        {key: x for key, x in lasting_all(store).items() if not CHOICE_PLAN.fullmatch(key)}
        for store in (out, whole)
    )
    assert found == expected


@pytest.mark.exhaustive
def test_layers_of_one_block_may_have_different_widths(
    command: AutoCommand, tmp_path: Path
) -> None:
    """As `compose --by-layers` of the choices has it."""
    out, composed = fresh(), fresh()
    assert quantize(command, out, recipe_file(tmp_path, target_bits=8.5, by_layers=True)) == 0
    runs = [choice(out, bits).root_url for bits in (2, 4)]
    target = ("--target-bits", 8.5, "--measure-windows", 4, "--output", composed.root_url)
    assert command("compose", *runs, *map(str, target), "--by-layers") in (0, 6)
    decisions = [Decision.read(store, Decision.key) for store in (out, composed)]
    assert decisions[0].content() == decisions[1].content()
    assert decisions[0].layers
    assert all(composed.get(file_key(part)) == out.get(file_key(part)) for part in (0, *PARTS))


@pytest.mark.exhaustive
def test_any_number_of_workers_leaves_the_same_bytes(command: AutoCommand, tmp_path: Path) -> None:
    recipe, found = recipe_file(tmp_path, target_bits=BETWEEN), []
    for workers in (1, 2, 3):
        out = fresh()
        assert quantize(command, out, recipe, "--workers", workers) == 0
        below = ("choices/", "composition/auto.json")  # which name the folder
        found.append({k: x for k, x in lasting_all(out).items() if not k.startswith(below)})
    assert found[0] == found[1] == found[2]


@pytest.mark.exhaustive
def test_stock_keras_answers_as_its_blocks_do(command: AutoCommand, tmp_path: Path) -> None:
    out = open_store(str(tmp_path / "out"))
    recipe = recipe_file(tmp_path, target_bits=BETWEEN)
    export = ("--export", "dense", "--evaluate-on", text_file(), "--windows", 2)
    assert quantize(command, out, recipe, *export) == 0
    assert out.exists("exports/dense/export.json")
    assert out.list("evaluations/")
    assert command("verify", out.root_url) == 0
    tokens = np.arange(5, 17, dtype=np.int32).reshape(1, 12)
    [found] = ask_stock([tmp_path / "out" / ARTIFACT_PREFIX], [tokens]).outputs
    source_url = str(source())
    models = []
    for bits in (2, 4):
        run = choice(out, bits)
        plan = read_plan(run)
        models.append(artifact_model(model_state(plan.to_json(), source_url), run))
    batch = batch_of(models[0], tokens)
    states = models[0].embed([batch])
    for call, number in enumerate(picked(out)):
        models[number].advance(call, states)
    expected = np.asarray(models[0].head()(states[0], batch))
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ({"scheme": {"mode": "auto"}}, "needs a size: target_bits, such as 3.5"),
        ({"tuning": {"steps": 3}}, "leave tuning out"),
        ({"calibration": None}, "add calibration"),
    ],
)
def test_mistakes_cost_one_line(
    rest: dict[str, Any], problem: str, command: AutoCommand, tmp_path: Path
) -> None:
    path = recipe_file(tmp_path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | rest))
    assert quantize(command, fresh(), path) == 2
    assert problem in command.complaint
    assert str(path) in command.complaint
    assert not command.opened


def test_plain_models_refuse_it(command: AutoCommand, tmp_path: Path) -> None:
    given = ("--recipe", recipe_file(tmp_path), "--output", tmp_path / "out")
    assert command("quantize", "model.keras", *given) == 2
    assert "the blocks of a plain Keras model, model.keras, are not known" in command.complaint


def test_an_output_that_holds_something_else_is_refused(
    command: AutoCommand, tmp_path: Path
) -> None:
    out = fresh()
    out.put("mine.txt", b"mine")
    assert quantize(command, out, recipe_file(tmp_path)) == 2
    assert "mine.txt is there already" in command.complaint
    assert list(out.list()) == ["mine.txt"]
