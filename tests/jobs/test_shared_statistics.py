"""Whoever needs statistics finds them, waits for them, or captures what is missing of them."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import jobs.quantize
from jobs.cli.main import main
from jobs.shared_statistics import captured_before, with_statistics
from pipeline.errors import LeaseHeldError, LeaseLostError, StatisticsError
from pipeline.float_statistics import statistics_plan, statistics_store
from pipeline.plan import PLAN_KEY, Plan
from pipeline.planning.make_plan import Planned
from pipeline.run.claim import claim
from pipeline.run.lease import PREFIX as LEASES
from pipeline.run.lease import Lease, acquire
from pipeline.run.records import MANIFEST_KEY, record_key
from pipeline.run.statistics_users import USERS_PREFIX, users
from pipeline.storage.object_store import ObjectStore, open_store
from tests.jobs.fleet.tiny_catalog import CountingCompute
from tests.pipeline.float_runs import planned_in_float, sharing
from tests.pipeline.tiny_runs import NUM_BLOCKS, recipe, source

_roots = itertools.count()


def fresh() -> str:
    return open_store(f"memory://shared-statistics/{next(_roots)}").root_url


def claimed(root: str, name: str) -> ObjectStore:
    """The store of a run that shares its statistics below a root."""
    given, store = shared(root), open_store(f"{root}/runs/{name}")
    assert given.windows is not None
    claim(store, given.plan, given.windows.to_bytes())
    return store


def shared(root: str) -> Planned:
    return sharing(planned_in_float("gptq"), root)


class Captures:
    """Stands for the work of capturing, which takes a while, and ends with a manifest."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.number = 0

    def __call__(self, plan: Plan, found: ObjectStore, held: Lease) -> None:
        self.number += 1
        assert found.exists(PLAN_KEY)
        assert plan.tokens is not None
        found.get(plan.tokens.key, sha256=plan.tokens.digest)
        time.sleep(self.seconds)
        found.create(MANIFEST_KEY, b"the manifest")


def soon(store: ObjectStore) -> Lease:
    return acquire(store, seconds=0.5)


def obtain(
    root: str,
    name: str,
    captures: Callable[[Plan, ObjectStore, Lease], None],
    acquire_lease: Callable[[ObjectStore], Lease] = soon,
) -> ObjectStore:
    """Have a run solve on its statistics; returns where these are."""
    store, plan = claimed(root, name), shared(root).plan
    found = statistics_store(plan, store.root_url)

    def solve() -> ObjectStore:
        if not found.exists(MANIFEST_KEY):
            raise StatisticsError("statistics cannot be used: none are there")
        return found

    return with_statistics(plan, store, acquire_lease, captures, solve)


def test_of_two_drivers_at_once_one_captures_and_the_other_waits_for_it() -> None:
    root, captures = fresh(), Captures(0.3)
    shared(root)  # planned by one thread
    errors: list[BaseException] = []

    def drive(name: str) -> None:
        try:
            obtain(root, name, captures)
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    drivers = [threading.Thread(target=drive, args=(name,)) for name in ("one", "two")]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert not errors
    assert captures.number == 1
    found = statistics_store(shared(root).plan, "")
    assert users(found) == {f"{root}/runs/one", f"{root}/runs/two"}


def test_a_dry_run_finds_what_was_captured_though_it_names_no_weights() -> None:
    root = fresh()
    plan = shared(root).plan
    by_metadata = plan.of_source([""] * len(plan.parts))
    assert not captured_before(by_metadata, "memory://elsewhere")
    obtain(root, "one", Captures())
    assert captured_before(by_metadata, "memory://elsewhere")
    assert plan.tokens is not None
    others = dataclasses.replace(plan.tokens, digest="0" * 64)
    assert not captured_before(dataclasses.replace(by_metadata, tokens=others), "")


def test_who_may_not_wait_is_told_who_captures() -> None:
    root = fresh()
    found = statistics_store(shared(root).plan, "")
    impatient = partial(acquire, seconds=0.5, wait=False)
    with soon(found), pytest.raises(LeaseHeldError, match=r"statistics/.*at work"):
        obtain(root, "one", Captures(), impatient)


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_another_driver_takes_over_is_waited_for(ends: bool) -> None:
    root, captures = fresh(), Captures()
    leases: list[Lease] = []

    def taken_over(plan: Plan, found: ObjectStore, held: Lease) -> None:
        leases.append(Lease(store=found, epoch=held.epoch + 1).start())
        found.create(f"{LEASES}{held.epoch + 1:05d}.json", b"{}")
        if ends:
            captures(plan, found, held)  # by the other one
        leases[-1].release()
        held.check()

    if ends:
        assert obtain(root, "one", taken_over).exists(MANIFEST_KEY)
        assert captures.number == 1
        return
    with pytest.raises(LeaseLostError, match=r"statistics/.*: to go on from it, repeat"):
        obtain(root, "one", taken_over)
    assert len(leases) == 3


def test_a_finished_run_whose_result_is_damaged_has_swept_statistics_captured_again() -> None:
    root, captures = fresh(), Captures()
    store = claimed(root, "one")
    for part in shared(root).plan.parts:
        store.create(record_key(part.part), b"a record")
    assert obtain(root, "one", captures).exists(MANIFEST_KEY)
    assert captures.number == 1


def test_a_run_that_waited_for_whoever_swept_them_is_noted_again() -> None:
    root = fresh()

    def after_sweeping(found: ObjectStore) -> Lease:
        for key in found.list():
            found.delete(key)
        return soon(found)

    found = obtain(root, "one", Captures(), after_sweeping)
    assert users(found) == {f"{root}/runs/one"}


@pytest.mark.parametrize("what", ["plan", "other plan", "tokens", "note"])
def test_what_a_killed_capture_left_damaged_is_written_again(what: str) -> None:
    root = fresh()
    given, store = shared(root), claimed(root, "one")
    wanted = statistics_plan(given.plan)
    assert wanted.tokens is not None
    found = statistics_store(given.plan, store.root_url)
    with_note = obtain(root, "one", Captures())
    [note] = with_note.list(USERS_PREFIX)
    key = {"tokens": wanted.tokens.key, "note": note}.get(what, PLAN_KEY)
    found.delete(MANIFEST_KEY)
    damaged = given.plan.to_json() if what == "other plan" else found.get(key)[:-9]
    found.put(key, damaged)
    captures = Captures()
    obtain(root, "one", captures)
    assert captures.number == 1
    assert found.get(PLAN_KEY) == wanted.to_json()
    assert users(found) == {store.root_url}


def quantize(folder: Path, *arguments: object, **calibration: Any) -> CountingCompute:
    """Call the command, in this process, for what it computes."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe("gptq", **calibration).to_dict()))
    compute = CountingCompute()
    given = ("quantize", source(), "--recipe", path, "--threads", 2, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.quantize, "open_compute", compute.open_compute)
        with pytest.raises(SystemExit):
            main(list(map(str, given)))
    return compute


@pytest.mark.exhaustive
def test_runs_share_the_folder_that_they_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sums"
    found = []
    for name in ("one", "two"):
        given = ("--output", tmp_path / name, "--statistics", folder)
        found.append(quantize(tmp_path, *given, statistics="float").calls["commit_sums"])
        assert (tmp_path / name / MANIFEST_KEY).exists()
        assert not (tmp_path / name / "statistics").exists()
    assert found == [NUM_BLOCKS, 0]
    [statistics] = folder.iterdir()
    stored = open_store(str(statistics))
    assert users(stored) == {f"file://{tmp_path}/one", f"file://{tmp_path}/two"}

    # A run stays with those that it was started with.
    (tmp_path / "one" / MANIFEST_KEY).unlink()
    capsys.readouterr()
    quantize(
        tmp_path,
        *("--output", tmp_path / "one", "--statistics", tmp_path / "other"),
        statistics="float",
    )
    told = " ".join(capsys.readouterr().err.split())
    assert f"started with those in {folder}; leave --statistics out" in told
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ("out", "out: lies inside the output"),
        ("out/artifact", "out/artifact: lies inside the output"),
        ("{source}/sums", "sums: lies inside the preset's own folder"),
        ("file/sums", "is a file, not a folder; choose another --statistics"),
        ("nowhere://a/sums", "nowhere://a/sums"),
    ],
)
def test_a_folder_that_cannot_be_meant_is_refused_in_one_line(
    named: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    url = named.format(source=source())
    if "://" not in url:
        url = str(tmp_path / url)
    given = ("--output", tmp_path / "out", "--statistics", url)
    compute = quantize(tmp_path, *given, statistics="float")
    told = capsys.readouterr().err.strip()
    assert problem in told.splitlines()[-1]
    assert told.splitlines()[-1].startswith("quantfleet: ")
    assert "Traceback" not in told
    assert not compute.opened
    assert not (tmp_path / "out").exists()


def test_a_folder_for_a_recipe_that_uses_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(tmp_path, "--output", tmp_path / "out", "--statistics", tmp_path / "sums")
    assert "recipe gptq uses none; give its calibration" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
