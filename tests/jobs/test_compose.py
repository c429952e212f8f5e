"""An artifact of a given size, made of the blocks of finished runs, that is a run like any."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jobs.compose
import jobs.composing
import jobs.quantize
import pipeline.storage.memory_store
import pipeline.worker.worker
from jobs.cli.main import app
from jobs.compose import ComposeJob
from jobs.composition_texts import AskedTexts
from jobs.execute import Compute
from pipeline.artifact.parts import decode_part
from pipeline.artifact.verification import ask_stock
from pipeline.composition.composed_plan import GivenLayers
from pipeline.composition.decision import Decision
from pipeline.composition.layer_errors import LayerErrors
from pipeline.composition.sensitivities import Sensitivity
from pipeline.composition.target import Target
from pipeline.errors import LeaseHeldError, StorageError
from pipeline.evaluation.named_texts import EvaluatedTexts
from pipeline.executor.protocol import Allocation, ComputeSpec
from pipeline.export.settings import ExportSettings
from pipeline.plan import read_plan
from pipeline.run.commits import committed_parts, read_manifest
from pipeline.run.evaluations import EVALUATIONS_PREFIX, Evaluation
from pipeline.run.records import ARTIFACT_PREFIX, PartRecord, file_key, record_key
from pipeline.run.worst_windows import find_worst_windows
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.model_state import ModelState
from pipeline.worker.streamed_model import artifact_model
from quantizer.schemes import GPTQScheme, Int8Scheme, Scheme
from tests.faults.killing import Killed, Killer, kill, killing_memory
from tests.integration.quantized import (
    FinishedRun,
    answer,
    batch_of,
    distance,
    finished_run,
    recipe,
)
from tests.integration.test_cli_quantize import Command, LateExecutor
from tests.pipeline.composition.composed_runs import composed_run
from tests.pipeline.presets import shared_preset
from tests.pipeline.tiny_runs import NUM_BLOCKS, lasting, model_state, text_file

SCHEMES: dict[str, Scheme] = {
    "w2": GPTQScheme(weight_bits=2, group_size=16, scale_search=False),
    "w4": GPTQScheme(weight_bits=4, group_size=16, scale_search=False),
    "int8": Int8Scheme(),
}
PARTS = range(1, NUM_BLOCKS + 1)
_fresh = iter(range(1_000))


class Runs(dict[str, FinishedRun]):
    """A finished run for each scheme, made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, name: str) -> FinishedRun:
        source = shared_preset("Llama3", num_blocks=NUM_BLOCKS)
        wanted = recipe(SCHEMES[name], name=name)
        return self.setdefault(name, finished_run(source, wanted, self._folder / name))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def command(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """The command line, with workers in this process: one by default, since each compiles."""
    workers = 2 if request.node.get_closest_marker("exhaustive") else 1
    executors: dict[tuple[str, str], LateExecutor] = {}

    @contextlib.contextmanager
    def open_compute(
        spec: ComputeSpec, source_url: str, run_url: str, **_: Any
    ) -> Iterator[Compute]:
        urls = source_url, run_url
        executor = executors.setdefault(urls, LateExecutor(workers, *urls))
        yield Compute(Allocation(workers=workers, threads=1), lambda: executor)

    monkeypatch.setattr(jobs.compose, "open_compute", open_compute)
    monkeypatch.setattr(jobs.quantize, "open_compute", open_compute)
    monkeypatch.setattr(
        pipeline.worker.worker, "ModelState", lambda plan, url: model_state(plan.to_json(), url)
    )
    return Command(capsys)


def block_bytes(run: FinishedRun) -> list[int]:
    return [PartRecord.read(run.store, record_key(part)).size_bytes for part in PARTS]


def between(runs: Runs, *names: str) -> str:
    """Bits a weight that blocks of these runs take on average."""
    weights = sum(part.num_weights for part in runs[names[0]].plan.parts[1:])
    return f"{8 * sum(sum(block_bytes(runs[n])) for n in names) / len(names) / weights:.4f}"


def given(runs: Runs, *names: str) -> list[Path]:
    return [runs[name].folder for name in names]


def fresh() -> str:
    return f"memory://composed/{next(_fresh)}"


MEASURED = ("--measure-windows", "4")
JUDGED = (*MEASURED, "--evaluate-on", text_file(), "--windows", "2")


def test_a_composition_is_a_run_like_any_other(runs: Runs, command: Command) -> None:
    """The best that its size allows, by what was measured of each block alone; of its runs' very
    bytes; with evaluation, provenance and a size that is kept."""
    names, out = ("w2", "int8"), open_store(fresh())
    bits = between(runs, *names)
    target = ("--target-bits", bits, "--output", out.root_url)
    code = command("compose", *given(runs, *names), *target, *JUDGED, "--json")
    found = json.loads(command.out)
    decision = found["decision"]
    assert code == (0 if decision["kept"] is None else 6), command.err
    picked = decision["picked"]
    assert set(picked) == {0, 1}
    assert found["choice"]["bits"] <= float(bits)
    # Every block costs less at eight bits, and the whole lies between the two runs.
    costs = [block["costs"] for block in found["blocks"]]
    assert all(int8 < w2 for w2, int8 in costs)
    assert decision["measured"] < decision["runs"][0]["measured"]
    assert decision["expected"] == pytest.approx(
        sum(of_block[one] for of_block, one in zip(costs, picked, strict=True))
    )
    plan, manifest = read_plan(out), read_manifest(out)
    for part, one in zip(PARTS, picked, strict=True):
        run = runs[names[one]]
        assert out.get(file_key(part)) == run.store.get(file_key(part))
        assert plan.parts[part] == run.plan.parts[part]
        assert plan.composed[part].recipe == names[one]
        for layer in plan.parts[part].layers:
            assert plan.recipe.scheme_for(layer.path, layer.kind) == layer.scheme
    given_parts = {x["recipe"]: x["parts"] for x in manifest.provenance["composed"]}
    assert sorted(part for parts in given_parts.values() for part in parts) == [0, *PARTS]
    assert all(given_parts[names[one]].count(part) for part, one in zip(PARTS, picked, strict=True))
    records = committed_parts(
        out, PartRecord, plan_digest=plan.digest, num_blocks=NUM_BLOCKS, chained=True, verify=True
    )
    assert not records.findings
    assert sum(x.size_bytes for x in records.parts.values()) == decision["size_bytes"]
    [key] = out.list(EVALUATIONS_PREFIX)
    evaluation = Evaluation.read(out, key)
    assert evaluation.manifest_sha256 == manifest.record_sha256
    assert evaluation.figures["divergence"] == pytest.approx(decision["measured"])
    assert find_worst_windows(out, evaluation)
    for page in ("README.md", "report.html"):
        assert b"int8" in out.get(page)
    assert command("verify", out.root_url, "--no-stock") == 0
    other = ("--target-bits", "99", "--output", out.root_url)
    assert command("compose", *given(runs, *names), *other, *JUDGED) == 2
    assert "is of another composition" in command.complaint


def by_layer(model: ModelState, store: ObjectStore, part: int) -> dict[str, dict[str, Any]]:
    """What is stored of a part, by layer and name."""
    values = decode_part(model.parts[part], store.get(file_key(part)))
    found: dict[str, dict[str, Any]] = {}
    for stored in model.parts[part].variables:
        found.setdefault(stored.layer_path, {})[stored.name] = values[stored.name_path]
    return found


def test_a_block_of_several_runs_holds_what_they_store(runs: Runs, tmp_path: Path) -> None:
    """Each layer is stored, and told of in record and provenance, as its own run has it."""
    two = {name: runs[name] for name in ("w2", "int8")}
    layers = [layer.path for layer in runs["w2"].plan.parts[2].layers if layer.scheme]
    moved = tuple(x for x in layers if x.rpartition("/")[2] in ("query", "key", "value"))
    moved = (*moved, layers[-1])
    assert len(moved) == 4
    out, manifest = composed_run(
        [run.store for run in two.values()],
        [0, 0, 0],
        str(tmp_path / "out"),
        [GivenLayers(block=1, run=1, layers=moved)],
    )
    plan = read_plan(out)
    assert [out.get(file_key(n)) == runs["w2"].store.get(file_key(n)) for n in PARTS] == [
        n != 2 for n in PARTS
    ]
    theirs = {name: by_layer(run.model, run.store, 2) for name, run in two.items()}
    found = by_layer(ModelState(plan, str(runs["w2"].source)), out, 2)
    assert found.keys() == theirs["w2"].keys()
    for path, arrays in found.items():
        expected = theirs["int8" if path in moved else "w2"][path]
        assert arrays.keys() == expected.keys()
        assert all(np.array_equal(arrays[name], expected[name]) for name in arrays)
    records = committed_parts(
        out, PartRecord, plan_digest=plan.digest, num_blocks=NUM_BLOCKS, chained=True, verify=True
    )
    assert not records.findings
    accounts = {name: run.layers() for name, run in two.items()}
    for layer in records.parts[2].layers:
        assert layer == accounts["int8" if layer.path in moved else "w2"][layer.path]
    origins = {x["recipe"]: x for x in manifest.provenance["composed"]}
    assert origins["w2"]["parts"] == [0, *PARTS]
    assert origins["int8"]["parts"] == []
    assert origins["int8"]["layers"] == list(moved)


@pytest.mark.exhaustive
def test_layers_of_a_block_are_chosen_and_made_so_whatever_is_killed(
    runs: Runs, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two runs within the size; stock Keras answers as the pipeline measured it."""
    bits = between(runs, "w2", "w4")

    def arguments(out: ObjectStore) -> tuple[str | Path, ...]:
        target = ("--target-bits", bits, "--by-layers", "--output", out.root_url)
        return (*given(runs, "w2", "w4"), *target, *JUDGED)

    whole = open_store(str(tmp_path / "out"))
    expected = command("compose", *arguments(whole))
    assert expected in (0, 6), command.err
    decision = Decision.read(whole, Decision.key)
    plan = read_plan(whole)
    assert decision.by_layers
    assert decision.other is not None
    # By layers, or by blocks: the one that measured better.
    assert decision.measured is not None
    assert decision.other.measured is not None
    assert decision.measured <= decision.other.measured
    sizes = [decision.size_bytes, decision.other.size_bytes]
    weights = sum(part.num_weights for part in plan.parts[1:])
    outside = whole.size(file_key(0))
    assert all(8 * (size - outside) <= float(bits) * weights for size in sizes)
    keys = whole.list("composition/layers/")
    assert len(keys) == 2 * NUM_BLOCKS
    first = next(x for key in keys if (x := LayerErrors.read(whole, key)).part == 1)
    for key in keys:
        found = LayerErrors.read(whole, key)
        inside = [sorted(path.rpartition("/")[2] for path in unit.layers) for unit in found.units]
        assert ["key", "query", "value"] in inside
        assert sum(map(len, inside)) == 7
        assert len(inside) == 4
        assert found.shares is not None
        assert sum(found.shares) == pytest.approx(1)
    out, kills = open_store(fresh()), 0
    for number in range(4, 1_000, 29):
        killer = Killer(end=kill, at=number, after=bool(number % 2))
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.storage.memory_store, "MemoryBackend", killing_memory(killer))
            try:
                assert command("compose", *arguments(out)) == expected
                break
            except Killed:
                kills += 1
    assert kills > 2
    made = lasting(whole)
    assert lasting(out) == made
    # As a kept run has no layers of others, this is seen to whatever was kept.
    mixed, _ = composed_run(
        [runs[name].store for name in ("w2", "w4")],
        decision.picked,
        str(tmp_path / "mixed"),
        decision.layers
        or [GivenLayers(block=0, run=1 - decision.picked[0], layers=first.units[0].layers)],
    )
    tokens = np.arange(5, 17, dtype=np.int32).reshape(1, 12)
    [theirs] = ask_stock([tmp_path / "mixed" / ARTIFACT_PREFIX], [tokens]).outputs
    state = ModelState(read_plan(mixed), str(runs["w2"].source))
    assert distance(theirs, answer(artifact_model(state, mixed), tokens)) < 1e-5


@pytest.mark.exhaustive
def test_what_is_measured_serves_every_budget_and_is_shown_before_anything_is_made(
    runs: Runs, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = open_store(fresh())
    where = ("--output", out.root_url, *MEASURED, "--dry-run", "--json")
    assert command("compose", *given(runs, "w2", "w4"), "--target-bits", "99", *where) == 0
    large = json.loads(command.out)
    assert large["choice"]["picked"] == [1] * NUM_BLOCKS
    kept = out.list()
    assert all(key.startswith("composition/sensitivities/") for key in kept)
    assert len(kept) == 2 * NUM_BLOCKS
    points = large["curve"]
    assert points[0]["picked"] == [0] * NUM_BLOCKS
    assert points[-1]["picked"] == [1] * NUM_BLOCKS
    assert [x["num_bytes"] for x in points] == sorted(x["num_bytes"] for x in points)
    assert [x["expected"] for x in points] == sorted((x["expected"] for x in points), reverse=True)

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(pipeline.worker.worker.Worker, "sensitivities", refuse)
    whole = sum(block_bytes(runs["w2"])) + runs["w2"].store.size(file_key(0))
    small = ("--target-bytes", str(whole), *where)
    assert command("compose", *given(runs, "w2", "w4"), *small) == 0
    assert json.loads(command.out)["choice"]["picked"] == [0] * NUM_BLOCKS
    assert out.list() == kept
    # Of a block that is damaged alone, or of a run that is new.
    out.put(kept[0], b"{}")
    with pytest.raises(AssertionError, match="measured again"):
        command("compose", *given(runs, "w2", "w4"), *small)
    monkeypatch.undo()


def refusals(runs: Runs) -> Iterator[tuple[list[str | Path], str]]:
    """Arguments beside --output, and what is said of them."""
    two = given(runs, "w2", "int8")
    bits = ("--target-bits", "9")
    yield [two[0], *bits], "at least two runs"
    yield [two[0], two[0], *bits], "the same result .* name each run once"
    yield [*two], "--target-bits or --target-bytes"
    yield [*two, *bits, "--target-bytes", "9"], "--target-bits or --target-bytes"
    yield (
        [*two, "--target-bits", "0.5"],
        r"the smallest blocks of these runs make \d+\.\d+ bits",
    )
    yield [*two, "--target-bits", "-1"], "more than 0"
    yield [*two, *bits, "--evaluate-on", "missing.jsonl"], "--evaluate-on, with --windows 8"
    yield [two[0], runs["w2"].source, *bits], "name the folder that quantfleet quantize wrote to"


def test_what_cannot_be_composed_is_refused_before_anything_is_written(
    runs: Runs, command: Command, tmp_path: Path
) -> None:
    for arguments, expected in refusals(runs):
        assert command("compose", *arguments, "--output", tmp_path / "out") in (2, 4)
        assert re.search(expected, command.complaint), command.complaint
    inside = runs["w2"].folder / "out"
    command("compose", *given(runs, "w2", "int8"), "--target-bits", "9", "--output", inside)
    assert "lies inside the run's own folder" in command.complaint
    assert not (tmp_path / "out").exists()
    assert not inside.exists()
    taken = {
        tmp_path / "taken": "choose an empty --output",
        tmp_path / "run": "the plan of a run that is no composition",
    }
    for folder in taken:
        folder.mkdir()
        (folder / "stranger.txt").write_text("")
    shutil.copy(runs["int8"].folder / "plan.json", tmp_path / "run")
    for folder, expected in taken.items():
        command("compose", *given(runs, "w2", "int8"), "--target-bits", "9", "--output", folder)
        assert expected in command.complaint
        assert not (folder / "composition").exists()


def poisoned(out: ObjectStore, runs: Runs, costs: dict[str, list[float]]) -> None:
    """Replace what was measured of each block alone."""
    for key in out.list("composition/sensitivities/"):
        found = Sensitivity.read(out, key)
        [name] = [
            name
            for name in costs
            if PartRecord.read(runs[name].store, record_key(found.part)).sha256
            == found.weights_sha256
        ]
        out.put(key, replace(found, cost=costs[name][found.part - 1]).to_json())


@pytest.mark.exhaustive
def test_a_run_that_measures_better_is_kept_and_said_to_be(runs: Runs, command: Command) -> None:
    out = open_store(fresh())
    arguments = (
        *given(runs, "w2", "int8"),
        *("--target-bits", "99", "--output", out.root_url, *JUDGED),
    )
    assert command("compose", *arguments, "--dry-run") == 0
    assert "chosen" in command.out
    poisoned(out, runs, {"w2": [0.0, 1.0, 1.0], "int8": [1.0, 0.0, 0.0]})
    assert command("compose", *arguments) == 6
    assert "the run int8" in command.complaint
    assert "the run is kept" in command.complaint
    for part in (0, *PARTS):
        assert out.get(file_key(part)) == runs["int8"].store.get(file_key(part))
    plan = read_plan(out)
    assert {origin.recipe for origin in plan.composed} == {"int8"}
    assert replace(plan, composed=()).digest == runs["int8"].plan.digest
    # As before, and as resuming says.
    made = lasting(out)
    assert command("compose", *arguments) == 6
    assert lasting(out) == made


@pytest.mark.exhaustive
def test_a_composition_that_is_killed_again_and_again_is_the_same_in_the_end(
    runs: Runs, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(out: ObjectStore) -> tuple[str | Path, ...]:
        target = ("--target-bits", between(runs, "w2", "w4"), "--output", out.root_url)
        return (*given(runs, "w2", "w4"), *target, *JUDGED)

    whole = open_store(fresh())
    expected = command("compose", *arguments(whole))
    out, kills = open_store(fresh()), 0
    for number in range(3, 1_000, 9):
        killer = Killer(end=kill, at=number, after=bool(number % 2))
        with monkeypatch.context() as patch:
            patch.setattr(pipeline.storage.memory_store, "MemoryBackend", killing_memory(killer))
            try:
                assert command("compose", *arguments(out)) == expected
                break
            except Killed:
                kills += 1
        if (plan := out.exists("plan.json")) and not out.exists("manifest.json"):
            assert plan
            assert command("resume", out.root_url) == 2
            assert "go on with the quantfleet compose" in command.complaint
            assert command("verify", out.root_url) == 4
            assert "finish it with the quantfleet compose" in command.complaint
    assert kills > 8
    assert lasting(out) == lasting(whole)


@pytest.mark.exhaustive
def test_one_composition_at_a_time_decides_what_an_output_is(
    runs: Runs, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = open_store(fresh())

    def compose(bits: str) -> int:
        target = ("--target-bits", bits, "--output", out.root_url, *MEASURED)
        return command(
            "compose", *given(runs, "w2", "w4"), *target, "--no-wait", "--lease-seconds", "5"
        )

    met: list[int] = []
    measure = jobs.composing.measure

    def meanwhile(*arguments: Any) -> Any:
        if not met:
            met.append(0)
            met[0] = compose("99")
            assert "is at work on this run" in command.complaint
        return measure(*arguments)

    monkeypatch.setattr(jobs.composing, "measure", meanwhile)
    bits = between(runs, "w2", "w4")
    ended = compose(bits)
    assert ended in (0, 6), command.err
    assert met == [LeaseHeldError.exit_code]
    assert Decision.read(out, Decision.key).target.bits == float(bits)
    made = lasting(out)
    assert compose("99") == 2
    assert "is of another composition" in command.complaint
    assert compose(bits) == ended
    assert lasting(out) == made


@pytest.mark.exhaustive
def test_questions_alone_leave_no_figures_of_the_texts_that_the_choice_was_made_by(
    runs: Runs, command: Command, tmp_path: Path
) -> None:
    out = open_store(fresh())
    questions = tmp_path / "common.jsonl"
    questions.write_text('{"question": "The dog is", "choices": ["lazy", "a box"], "answer": 0}')
    target = ("--target-bits", between(runs, "w2", "w4"), "--output", out.root_url)
    arguments = (*given(runs, "w2", "w4"), *target, *MEASURED, "--tasks", str(questions))
    ended = command("compose", *arguments)
    assert ended in (0, 6), command.err
    [key] = out.list(EVALUATIONS_PREFIX)
    evaluation = Evaluation.read(out, key)
    assert list(evaluation.measured_on) == ["tasks"]
    assert [task["name"] for task in evaluation.figures["tasks"]] == ["common"]
    assert evaluation.figures["num_windows"] == 0
    kept = out.get(key)
    assert command("compose", *arguments) == ended
    assert out.list(EVALUATIONS_PREFIX) == (key,)
    assert out.get(key) == kept


@pytest.mark.exhaustive
def test_stock_keras_answers_as_its_blocks_do(runs: Runs, command: Command, tmp_path: Path) -> None:
    """Blocks of three schemes, one of them without calibration."""
    out = tmp_path / "out"
    arguments = (*given(runs, "w2", "w4", "int8"), "--output", out, *MEASURED)
    assert command("compose", *arguments, "--target-bits", "99", "--dry-run") == 0
    costs = {"w2": [0.0, 1.0, 1.0], "w4": [1.0, 0.0, 1.0], "int8": [1.0, 1.0, 0.0]}
    poisoned(open_store(str(out)), runs, costs)
    # Too little for int8 as a whole, which would be better.
    sizes = [block_bytes(runs[name])[block] for block, name in enumerate(costs)]
    whole = sum(sizes) + runs["w2"].store.size(file_key(0))
    code = command("compose", *arguments, "--target-bytes", str(whole), "--json")
    decision = json.loads(command.out)["decision"]
    assert decision["picked"] == [0, 1, 2]
    assert code == 0, command.err
    tokens = np.arange(5, 17, dtype=np.int32).reshape(1, 12)
    [found] = ask_stock([out / ARTIFACT_PREFIX], [tokens]).outputs
    expected = streamed(runs, ("w2", "w4", "int8"), tokens)
    assert distance(found, expected) < 1e-5


def streamed(runs: Runs, names: tuple[str, ...], tokens: Any) -> Any:
    """What the runs' own artifacts make of tokens, each sending them through its block."""
    models = [artifact_model(runs[name].model, runs[name].store) for name in names]
    batch = batch_of(models[0], tokens)
    states = models[0].embed([batch])
    for block, model in enumerate(models):
        model.advance(block, states)
    return models[0].head()(states[0], batch)


@pytest.mark.exhaustive
def test_an_export_is_made_with_the_composition_or_by_the_command_that_it_leaves(
    runs: Runs, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = open_store(fresh())
    bits = between(runs, "w2", "w4")
    arguments = ("--target-bits", bits, "--output", out.root_url, "--export", "compressed-tensors")
    assert command("compose", *given(runs, "w2", "w4"), *arguments[:4], "--export", "gptq") == 2
    assert "one width for all layers" in command.complaint
    assert not out.list()

    def full(*_: Any) -> None:
        raise StorageError("the store is full")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.compose, "make_exports", full)
        assert command("compose", *given(runs, "w2", "w4"), *arguments, *MEASURED) == 3
    told = " ".join(command.err.split())
    words = shlex.split(told[told.index("quantfleet compose") :].partition(" quantfleet: ")[0])
    made = lasting(out)
    assert command(*words[1:]) in (0, 6), command.err
    export = out.list("exports/compressed-tensors/")
    assert "exports/compressed-tensors/export.json" in export
    assert {key: data for key, data in lasting(out).items() if key in made} == made
    lines = command.err.splitlines()
    assert any(line.startswith("report:  ") for line in lines)


@pytest.mark.parametrize(
    "asked",
    [
        ComposeJob(
            run_urls=("/runs/a b", "s3://bucket/run"),
            output_url="/o",
            target=Target(bits=3.5),
            asked=AskedTexts(measure_windows=3),
        ),
        ComposeJob(
            run_urls=("a", "b"),
            output_url="o",
            target=Target(num_bytes=5_000_000_000),
            source_url="s3://bucket/it's moved",
            asked=AskedTexts(
                measure_texts=("m.txt",),
                evaluated_on=EvaluatedTexts(texts=("t",), sets={"code": ("c.jsonl",)}),
                evaluation_windows=2,
                tasks=("one.jsonl",),
                chat=False,
            ),
            exports=(ExportSettings(format="dense", like_url="s3://bucket/source"),),
        ),
    ],
    ids=["alone", "with all there is"],
)
def test_the_command_to_go_on_asks_for_the_same_composition(
    asked: ComposeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[ComposeJob] = []
    monkeypatch.setattr(jobs.compose, "compose", lambda job, *_, **__: found.append(job))
    program, *arguments = shlex.split(asked.command)
    assert program == "quantfleet"
    app(arguments, standalone_mode=False)
    assert found == [asked]
