"""Mixtures of experts: codes beside the artifact, and stock Keras answers with what they stand for.

By default one run of a Mixtral at 4 bits is looked at from all sides. Two more are exhaustive; all
six families that KerasHub has, and the other schemes, are slow:

    .venv/bin/pytest -m slow tests/integration/test_experts.py
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pipeline.storage.memory_store
from jobs.cli.main import main
from jobs.expert_summary import ExpertSummary
from jobs.publish.verified_files import check_artifact
from jobs.release.contents import artifact_contents, read_run
from jobs.verify import verify_run
from pipeline.artifact.codes_file import codes_file_bytes, read_codes_file
from pipeline.artifact.parts import decode_part
from pipeline.artifact.verification import inspect_artifact
from pipeline.errors import ArtifactError
from pipeline.model.preset import read_preset
from pipeline.model.weight_layout import weight_layout
from pipeline.plan import LayerPlan
from pipeline.planning.make_plan import Planned, make_plan
from pipeline.recipe.recipe import Recipe, Rule
from pipeline.run.claim import claim
from pipeline.run.commits import committed_file, read_manifest
from pipeline.run.garbage import find_garbage
from pipeline.run.records import PartRecord, codes_key, file_key, record_key
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.worker.statistics import finished
from pipeline.worker.worker import Worker
from quantizer import HessianSum, solve
from quantizer.expert_codes import ExpertCodes
from quantizer.experts import ExpertHessians
from quantizer.result import output_error
from quantizer.schemes import GPTQScheme, Int4Scheme, Int8Scheme, Scheme
from tests.families.tiny_families import shared_family
from tests.faults.killing import WRITES, Killed, Killer, kill, killing_memory
from tests.integration.quantized import FinishedRun, finished_run, recipe
from tests.integration.stock_session import StockSession, assert_same, stock_session
from tests.pipeline.artifacts import load
from tests.pipeline.tiny_runs import execute, lasting

SCHEMES: dict[str, Scheme] = {
    "gptq4": GPTQScheme(weight_bits=4, group_size=16, scale_search=False),
    "gptq3": GPTQScheme(weight_bits=3, group_size=16, scale_search=False, symmetric=True),
    "int8": Int8Scheme(),
    "int4": Int4Scheme(block_size=16),
}
FAMILIES = ["Mixtral", "Qwen3Moe", "QwenMoe", "Qwen3_5Moe", "GptOss", "Gemma4 with experts"]
_EVERY = [
    *itertools.product(FAMILIES[:2], ["gptq4", "gptq3", "int8"]),
    *((family, "gptq4") for family in FAMILIES[2:]),
    ("Mixtral", "int4"),
]
_EXHAUSTIVE = [("Mixtral", "int8"), ("Qwen3Moe", "gptq3")]


def cases(default: Sequence[tuple[str, str]], exhaustive: Sequence[tuple[str, str]]) -> list[Any]:
    """All families and schemes that are tried; those named neither by default nor so are slow."""
    return [
        pytest.param(
            *case,
            marks=()
            if case in default
            else pytest.mark.exhaustive
            if case in exhaustive
            else pytest.mark.slow,
        )
        for case in _EVERY
    ]


CASES = cases([("Mixtral", "gptq4")], _EXHAUSTIVE)
_numbers = itertools.count()


def wanted(scheme: str) -> Recipe:
    # Stock KerasHub cannot build GPT-OSS with an attention in gptq.
    return recipe(SCHEMES[scheme], Rule(pattern="attention|linear_attn", scheme=None))


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], FinishedRun]:
    """A finished run of a family in a scheme, made once."""

    @cache
    def made(family: str, scheme: str) -> FinishedRun:
        folder = tmp_path_factory.mktemp("experts")
        return finished_run(shared_family(family), wanted(scheme), folder)

    return made


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockSession]:
    with stock_session(tmp_path_factory.mktemp("stock")) as session:
        yield session


def banks_of(run: FinishedRun) -> dict[str, ExpertCodes]:
    """All codes of a run, by variable path."""
    found: dict[str, ExpertCodes] = {}
    for part in run.plan.parts[1:]:
        found |= read_codes_file(run.store.get(codes_key(part.part)))
    return found


def values_of(run: FinishedRun) -> dict[str, NDArray[Any]]:
    """All variables of an artifact, by path."""
    found = {}
    for part in run.model.parts:
        values = decode_part(part, committed_file(run.store, part.number))
        found |= {str(one.variable.path): values[one.name_path] for one in part.variables}
    return found


def planned_banks(run: FinishedRun) -> dict[str, LayerPlan]:
    layers = (layer for part in run.plan.parts for layer in part.layers)
    return {layer.path: layer for layer in layers if layer.experts and layer.scheme}


Runs = Callable[[str, str], FinishedRun]


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_stock_keras_holds_what_the_codes_stand_for(family: str, scheme: str, run_of: Runs) -> None:
    run = run_of(family, scheme)
    banks, planned = banks_of(run), planned_banks(run)
    assert banks.keys() == planned.keys()
    assert len(banks) >= 2 * run.plan.num_blocks
    source = {k: v for part in run.plan.parts for k, v in run.model.read(part.part).items()}
    # Keras numbers some names, and so paths, anew for each model of a process; not in files.
    stock = {x.name_path: x.variable for x in weight_layout(load(run.artifact).backbone)}
    stored = (one for part in run.model.parts for one in part.variables)
    loaded = {str(x.variable.path): np.asarray(stock[x.name_path].value) for x in stored}
    for path, bank in banks.items():
        layer = planned[path]
        assert bank.codes_ERC.shape == (layer.experts, layer.out_features, layer.in_features)
        np.testing.assert_array_equal(loaded[path], bank.kernel(loaded[path].dtype))
        assert not np.array_equal(loaded[path], source[path])
    in_float = {x.path for part in run.plan.parts for x in part.layers if x.scheme is None}
    routers = [path for path in source if path.rpartition("/")[0] in in_float]
    assert len([path for path in routers if "router" in path or "gate" in path]) >= 2
    for path in routers:
        np.testing.assert_array_equal(loaded[path], source[path])


@pytest.mark.parametrize(("family", "scheme"), cases([], _EXHAUSTIVE))
def test_stock_keras_answers_the_same(
    family: str, scheme: str, run_of: Runs, stock: StockSession
) -> None:
    assert_same(run_of(family, scheme), stock)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_narrow_models_hold_what_the_codes_stand_for_in_their_own_dtype(
    dtype: Any, stock: StockSession, tmp_path: Path
) -> None:
    narrow = wanted("gptq4").model_copy(update={"dtype": dtype})
    run = finished_run(shared_family("Mixtral"), narrow, tmp_path)
    values, banks = values_of(run), banks_of(run)
    assert banks
    for path, bank in banks.items():
        assert str(values[path].dtype) == str(bank.scale_ERG.dtype) == dtype
        np.testing.assert_array_equal(values[path], bank.kernel(values[path].dtype))
    # Compiled and not, Keras' own answers in 16 bits differ as much.
    assert_same(run, stock, tolerance=8e-2)


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_the_records_say_how_the_experts_were_reached(
    family: str, scheme: str, run_of: Runs
) -> None:
    run, records = run_of(family, scheme), run_of(family, scheme).layers()
    for group in (group for part in run.plan.parts for group in part.groups if group.experts):
        for path, layer in planned_banks(run).items():
            if layer.name not in group.targets:
                continue
            account = records[path].account
            assert account is not None
            least, median, most = account["experts"]["tokens"]
            assert 0 <= least <= median <= most
            assert run.plan.tokens is not None
            num_tokens = run.plan.tokens.num_samples * run.plan.tokens.sequence_length
            assert account["num_rows"] == num_tokens * layer.experts_per_token
            assert account["output_error"] < account["rtn_output_error"]


def errors_on(run: FinishedRun, text: str, folder: Path) -> dict[str, tuple[float, float]]:
    """Output error on another text of each bank and of rounding it, in the float model."""
    calibration = run.plan.recipe.calibration
    assert calibration is not None
    (folder / "text.txt").write_text(text)
    other = calibration.model_copy(update={"texts": (str(folder / "text.txt"),), "num_samples": 60})
    given = make_plan(
        read_preset(str(run.source)),
        run.plan.recipe.model_copy(update={"calibration": other}),
        threads=1,
    )
    assert given.windows is not None
    assert given.plan.tokens is not None
    store, shards = open_store(str(folder / "run")), range(len(given.plan.tokens.shards))
    claim(store, given.plan, given.windows.to_bytes())
    worker = Worker(given.plan, given.plan.source_url, store.root_url)
    worker.restore(0, shards, 0)
    values, stored = worker.read(1), values_of(run)
    layers = {layer.name: layer for layer in given.plan.parts[1].layers}
    found = {}
    for stage, group in enumerate(given.plan.parts[1].groups):
        experts = range(group.experts) if group.experts else None
        held = worker.capture(0, stage, shards, values, experts=experts)
        statistics = finished(worker.send(held))
        for layer in (layers[name] for name in group.targets if layers[name].experts):
            pairs = []
            for number in range(layer.experts):
                own = isinstance(statistics, ExpertHessians)
                one = statistics.of_expert(number) if own else statistics
                if one.num_rows:
                    weight_RC, ours_RC = values[layer.path][number].T, stored[layer.path][number].T
                    pairs.append(_errors(weight_RC, ours_RC, one, layer.scheme))
            found[layer.path] = (sum(ours for ours, _ in pairs), sum(other for _, other in pairs))
    return found


def _errors(
    weight_RC: NDArray[Any], ours_RC: NDArray[Any], hessian: HessianSum, scheme: Any
) -> tuple[float, float]:
    """Sums over rows, of our values and of those rounded to nearest on the same kind of grid."""
    blind = HessianSum(np.eye(weight_RC.shape[1], dtype=np.float32), 1)
    rounded = solve(weight_RC, blind, scheme).weight.dequantize()
    both = (output_error(weight_RC, values, hessian) for values in (ours_RC, rounded))
    ours, other = (error * hessian.num_rows for error in both)
    return ours, other


HELD_OUT = [case for case in CASES if case.values[1].startswith("gptq")]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "scheme"), HELD_OUT)
def test_no_bank_is_worse_than_rounding_on_other_text(
    family: str, scheme: str, run_of: Runs, tmp_path: Path
) -> None:
    text = "".join(topics[name] for name in sorted(topics)[:30])
    found = errors_on(run_of(family, scheme), text, tmp_path)
    assert len(found) >= 2
    for path, (ours, rounded) in found.items():
        assert ours < rounded, path


@cache
def planned_for(family: str, scheme: str) -> Planned:
    return make_plan(read_preset(str(shared_family(family))), wanted(scheme), threads=2)


def fresh() -> ObjectStore:
    return open_store(f"memory://experts/{next(_numbers)}")


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_any_number_of_workers_leaves_the_same_bytes(family: str, scheme: str) -> None:
    given = planned_for(family, scheme)
    left = []
    for workers in (1, 2, 3):
        store = fresh()
        execute(given, store, workers=workers)
        left.append(lasting(store))
    assert left[0] == left[1] == left[2]
    assert codes_key(1) in left[0]
    assert codes_key(0) not in left[0]


def test_a_run_killed_beside_its_codes_ends_with_the_same_bytes() -> None:
    kill_at("Mixtral", "gptq4", only_codes=True)


@pytest.mark.parametrize(("family", "scheme"), cases([], _EXHAUSTIVE[:1]))
def test_a_run_killed_at_any_write_ends_with_the_same_bytes(family: str, scheme: str) -> None:
    kill_at(family, scheme, only_codes=False)


def kill_at(family: str, scheme: str, *, only_codes: bool) -> None:
    """Kill runs at every write, or at those of the first file of codes and the record after it."""
    given = planned_for(family, scheme)

    def run(store: ObjectStore, killer: Killer) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline.storage.memory_store, "MemoryBackend", killing_memory(killer))
            execute(given, open_store(store.root_url), workers=2, keep_every=1)

    store, killer = fresh(), Killer(kill)
    run(store, killer)
    expected = lasting(store)
    operations = [(operation, key) for operation, key in killer.seen]
    writes = [number for number, (name, _) in enumerate(operations, start=1) if name in WRITES]
    of_codes = [number for number in writes if "codes/" in operations[number - 1][1]]
    assert len(of_codes) == given.plan.num_blocks
    for number in [of_codes[0], of_codes[0] + 1] if only_codes else writes:
        store = fresh()
        with pytest.raises(Killed):
            run(store, Killer(kill, at=number))
        run(store, Killer(kill))
        assert lasting(store) == expected, operations[number - 1]


def test_a_published_result_has_its_codes_and_a_release_of_the_artifact_does_not(
    run_of: Runs,
) -> None:
    run = run_of("Mixtral", "gptq4")
    names = artifact_contents(read_run(run.store, str(run.folder))).files
    assert "model_00001.weights.h5" in names
    assert not any("codes" in name for name in names)
    root, run_id = fresh(), "mixtral-test-0123456789ab"
    for key in run.store.list():
        root.put(f"runs/{run_id}/{key}", run.store.get(key))
    manifest_sha256 = read_manifest(run.store).record_sha256
    assert check_artifact(root, run_id, manifest_sha256).problem == ""
    root.put(f"runs/{run_id}/{codes_key(2)}", b"x")
    assert check_artifact(root, run_id, manifest_sha256).problem == (
        f"artifact damaged: {codes_key(2)}"
    )


def test_codes_of_another_run_are_refused(run_of: Runs) -> None:
    run = run_of("Mixtral", "gptq4")

    def codes(part: int) -> bytes | None:
        return run.store.get(codes_key(part)) if part else None

    inspect_artifact(run.artifact, codes)
    banks = read_codes_file(run.store.get(codes_key(2)))
    path, bank = next(iter(banks.items()))
    banks[path] = replace(bank, codes_ERC=bank.codes_ERC ^ 1)
    with pytest.raises(ArtifactError, match=f"model_00002.*the values of {path}"):
        inspect_artifact(run.artifact, lambda part: codes_file_bytes(banks) if part == 2 else None)


@pytest.mark.exhaustive
def test_verify_says_that_experts_are_loaded_as_float(
    run_of: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("Mixtral", "gptq4")
    size = sum(run.store.size(key) for key in run.store.list("codes/"))
    verify_run(str(run.folder), stock=True, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["codes_bytes"] == size
    assert "loads it" in found["stock"]
    with pytest.raises(SystemExit):
        main(["verify", str(run.folder), "--no-stock"])
    said = capsys.readouterr()
    assert (
        f"{size:,} bytes of these are codes of experts, which stock KerasHub loads as float"
        in " ".join((said.out + said.err).split())
    )


def test_the_summary_says_where_codes_are_and_how_experts_were_reached(run_of: Runs) -> None:
    run = run_of("Mixtral", "gptq4")
    records = [
        PartRecord.from_json(run.store.get(record_key(part.part))) for part in run.plan.parts
    ]
    found = ExpertSummary.of(run.plan, records)
    assert found is not None
    assert found.codes_bytes == sum(run.store.size(key) for key in run.store.list("codes/"))
    # Each of 2 blocks has 4 experts of three 32 × 64 matrices.
    assert found.num_weights == 2 * 4 * 3 * 32 * 64
    assert found.experts == 2 * 4
    assert found.tokens is not None
    assert found.tokens[0] <= found.tokens[1] <= found.tokens[2] < 320
    (_, codes), (_, tokens) = found.rows()
    assert "stock KerasHub loads experts as float" in codes
    assert f"{found.below_floor} of 8 had fewer than four for each input" in tokens
    int8 = planned_for("Mixtral", "int8")
    store = fresh()
    execute(int8, store)
    records = [PartRecord.from_json(store.get(key)) for key in store.list("records/")]
    uncalibrated = ExpertSummary.of(int8.plan, records)
    assert uncalibrated is not None
    assert uncalibrated.tokens is None
    assert len(uncalibrated.rows()) == 1


def test_damaged_codes_are_found_made_again_and_collected() -> None:
    given = planned_for("Mixtral", "int8")
    store = fresh()
    execute(given, store)
    before, manifest = lasting(store), read_manifest(store)
    assert codes_key(2) in manifest.files
    # A run that is not finished resumes from what is whole.
    store.delete(manifest.key)
    store.put(codes_key(2), store.get(codes_key(2))[:-1] + b"x")
    _, executor = execute(given, store)
    assert executor.solved_parts() == [2]
    assert lasting(store) == before
    store.put(codes_key(77), b"of an earlier version")
    reasons = {one.key: one.reason for one in find_garbage(store)}
    assert reasons[codes_key(77)] == "not named by the manifest"
    assert not {codes_key(1), codes_key(2), file_key(1)} & reasons.keys()
