"""The status of runs and releases is read from storage alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from jobs.catalog.catalog_file import parse_catalog
from jobs.catalog.request import Request, run_store, save_request
from jobs.cli.main import main
from jobs.fleet.staleness import decide
from jobs.fleet.status import Row, RunStatus, run_status, status
from jobs.publish.releases import publish
from jobs.publish.verdict import Verdict, save_verdict
from jobs.quantities import duration
from pipeline.executor.protocol import Allocation
from pipeline.run import lease
from pipeline.run.events import EventLog, read_events, seconds_per_part
from pipeline.storage.object_store import ObjectStore, open_store
from tests.jobs.fleet.large_catalog import catalog_text, done_catalog, finish, write_sources
from tests.pipeline.tiny_runs import NUM_BLOCKS, CrashError, crash_at, execute, planned


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"memory://status/{request.node.name}"


def start_and_crash(store: ObjectStore) -> None:
    """A run whose driver died after its second part, with the events that it wrote."""
    given = planned("int8")
    log = EventLog(store, given.plan, Allocation(workers=1, threads=2))
    with pytest.raises(CrashError):
        execute(given, store, report=log.also(crash_at(1)))


def test_a_run_is_running_while_its_driver_reports_and_silent_after(url: str) -> None:
    store = open_store(url)
    assert run_status(store).state == "not started"
    held = lease.acquire(store, seconds=1.0)
    assert run_status(store).state == "planning"
    start_and_crash(store)
    found = run_status(store)
    assert (found.state, found.parts_done, found.parts) == ("running", 2, NUM_BLOCKS + 1)
    assert found.heartbeat_seconds is not None
    assert found.heartbeat_seconds < 30
    assert found.seconds_a_part is not None
    assert found.seconds_left == pytest.approx(found.seconds_a_part * (NUM_BLOCKS - 1))
    assert found.source_bytes is not None
    assert 0 < (found.stored_bytes or 0) < found.source_bytes
    held._ended.set()  # it falls silent without a word
    held.release = lambda: None  # type: ignore[method-assign]
    time.sleep(0.3)
    beat = json.loads(store.get("leases/00001.beat.json"))
    store.put("leases/00001.beat.json", json.dumps(beat | {"released": False}).encode())
    assert run_status(store, term_seconds=-1.0).state == "silent"
    store.put("leases/00001.beat.json", json.dumps(beat | {"released": True}).encode())
    stopped = run_status(store)
    assert (stopped.state, stopped.seconds_left) == ("stopped", None)
    execute(planned("int8"), store)
    done = run_status(store)
    assert (done.state, done.parts_done) == ("finished", NUM_BLOCKS + 1)


def test_events_are_listed_by_time(url: str) -> None:
    store = open_store(url)
    start_and_crash(store)
    store.put("events/19990101T000000-broken.jsonl", b'{"time": 3}\nno json\n\xff\n[]\n')
    later = b'{"time": "2999-01-01T00:00:00+00:00", "event": "sealed"}\n'
    store.put("events/00-later.jsonl", later)
    events = read_events(store)
    assert [event.name for event in events] == ["started", "committed", "committed", "sealed"]
    lines = [event.line() for event in events]
    assert "part=1" in lines[2]
    assert lines[-1] == "2999-01-01T00:00:00+00:00 sealed"
    assert seconds_per_part(events[:3]) is not None
    assert seconds_per_part(()) is None


@pytest.fixture
def catalog(url: str) -> tuple[ObjectStore, dict[str, Request]]:
    """Five models, nothing made yet."""
    write_sources(url, 5)
    wanted = parse_catalog(catalog_text(url, 5), where="c.yaml", folder=None)
    root = open_store(wanted.root_url)
    decisions = decide(root, wanted, save_verified=False)
    return root, {one.request.model: one.request for one in decisions}


def rows_of(root: ObjectStore, url: str) -> dict[str, Row]:
    wanted = parse_catalog(catalog_text(url, 5), where="c.yaml", folder=None)
    # What is published comes first.
    return {row.model: row for row in reversed(status(root, wanted))}


def test_status_has_a_row_for_each_model(
    url: str, catalog: tuple[ObjectStore, dict[str, Request]]
) -> None:
    root, requests = catalog
    assert {row.state for row in rows_of(root, url).values()} == {"not started"}
    finish(root, requests["m0000"])
    save_request(root, requests["m0001"])
    start_and_crash(run_store(root, requests["m0001"].run_id))
    save_request(root, requests["m0002"])
    finish(root, requests["m0003"])
    root.put("models/m0003/int8/current.json", b"{}")
    save_request(root, requests["m0004"])
    bad = Verdict(
        request_id=requests["m0004"].request_id,
        model="m0004",
        recipe_name="int8",
        run_id=requests["m0004"].run_id,
        plan_digest="0" * 64,
        manifest_sha256="0" * 64,
        source_bytes=20,
        stored_bytes=10,
        quality={"source_perplexity": 20.0, "result_perplexity": 30.0, "cosine": None},
        gate={"max_perplexity_increase": 0.1},
        failures=("perplexity 20 → 30",),
    )
    save_verdict(root, bad)
    rows = rows_of(root, url)
    assert {name: row.state for name, row in rows.items()} == {
        "m0000": "published",
        "m0001": "stopped",
        "m0002": "not started",
        "m0003": "damaged",
        "m0004": "gate failed",
    }
    assert (rows["m0000"].release, rows["m0000"].stored_bytes) == (1, 600)
    found = rows["m0001"].run
    assert isinstance(found, RunStatus)
    assert (found.parts_done, found.parts) == (2, NUM_BLOCKS + 1)
    assert rows["m0004"].text == "perplexity 20 → 30"
    # Of the damaged release also the run, which is whole.
    assert len(status(root)) == 6


def test_a_request_later_than_the_release_has_its_own_row(
    url: str, catalog: tuple[ObjectStore, dict[str, Request]]
) -> None:
    import dataclasses

    root, requests = catalog
    first = requests["m0000"]
    finish(root, first)
    time.sleep(0.01)
    second = dataclasses.replace(first, source={"config.json": "other"})
    save_request(root, second)
    rows = [row for row in status(root) if row.model == "m0000"]
    assert [(row.state, row.request_id) for row in rows] == [
        ("published", first.request_id),
        ("not started", second.request_id),
    ]
    # Once that is published, the earlier request is history.
    verdict = Verdict(
        request_id=second.request_id,
        model="m0000",
        recipe_name="int8",
        run_id=second.run_id,
        plan_digest="0" * 64,
        manifest_sha256="0" * 64,
        source_bytes=2,
        stored_bytes=1,
        quality=None,
        gate=None,
    )
    publish(root, second, verdict)
    assert [row.release for row in status(root) if row.model == "m0000"] == [2]


def test_the_command_prints_tables_and_json(
    url: str,
    catalog: tuple[ObjectStore, dict[str, Request]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    root, requests = catalog
    finish(root, requests["m0000"])
    run = run_store(root, requests["m0001"].run_id)
    start_and_crash(run)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    code, out, _ = call("status", root.root_url)
    assert code == 0
    assert "published, release 1" in out
    [row] = json.loads(call("status", root.root_url, "--json")[1])
    assert (row["model"], row["state"]) == ("m0000", "published")
    [row] = json.loads(call("status", run.root_url, "--json")[1])
    assert (row["state"], row["run"]["parts_done"]) == ("stopped", 2)
    code, out, _ = call("logs", run.root_url)
    assert (code, out.count(" committed ")) == (0, 2)
    assert len(json.loads(call("logs", run.root_url, "--json")[1])) == 3
    for command in ("status", "logs"):
        code, out, err = call(command, f"{url}/nowhere")
        assert (code, out) == (2, "")
        assert err.startswith(f"quantfleet: {url}/nowhere: ")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (60, "60 s"), (180, "3 min"), (9000, "2.5 h")],
)
def test_durations_are_short(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.exhaustive
def test_many_entries_are_decided_and_listed_within_seconds(url: str) -> None:
    """Linear: each entry costs the same few requests."""
    spent: dict[int, list[float]] = {}
    for number in (30, 300):
        catalog = done_catalog(f"{url}/{number}", number)
        root = open_store(catalog.root_url)
        calls: list[Callable[[], object]] = [
            lambda root=root, catalog=catalog: tuple(decide(root, catalog, save_verified=True)),
            lambda root=root, catalog=catalog: status(root, catalog),
        ]
        spent[number] = []
        for call in calls:
            start = time.perf_counter()
            assert len(call()) == number  # type: ignore[arg-type]
            spent[number].append(time.perf_counter() - start)
        assert {one.state for one in decide(root, catalog, save_verified=True)} == {"fresh"}
    assert sum(spent[300]) < 15
