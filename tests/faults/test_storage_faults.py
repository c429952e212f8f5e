"""A run through a network that loses, delays, cuts and falsifies: late, but the same bytes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from pipeline.errors import DivergenceError, MissingObjectError, PipelineError, StorageError
from pipeline.run.commits import damaged_files, read_manifest
from pipeline.run.records import MANIFEST_KEY, file_key
from pipeline.storage.backend import Patience
from pipeline.storage.object_store import ObjectStore, open_store
from tests.fault_proxy import FAULTS, FaultProxy, spoil
from tests.pipeline.tiny_runs import CrashError, crash_at, execute, lasting, planned
from tests.s3 import S3Server

QUICK = Patience(deadline_seconds=60, read_seconds=1, longest_pause_seconds=0.2)
HOPELESS = Patience(deadline_seconds=2, read_seconds=0.5, longest_pause_seconds=0.2)
# A hang costs a second each.
_WEIGHTS = {fault: 1 if fault == "hang" else 6 for fault in FAULTS}
_numbers = itertools.count()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("s3", id="moto"),
        pytest.param("radosgw", marks=pytest.mark.radosgw, id="radosgw"),
    ],
)
def server(request: pytest.FixtureRequest) -> S3Server:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def spoiled(server: S3Server) -> Iterator[tuple[FaultProxy, str]]:
    with spoil(server.endpoint_url) as found:
        yield found


@pytest.fixture
def proxy(
    server: S3Server, spoiled: tuple[FaultProxy, str], monkeypatch: pytest.MonkeyPatch
) -> FaultProxy:
    proxy, url = spoiled
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    patience_of(QUICK, monkeypatch)
    proxy.plan()
    return proxy


def patience_of(patience: Patience, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patience, "configured", classmethod(lambda cls: patience))


@pytest.fixture
def store(server: S3Server, proxy: FaultProxy) -> ObjectStore:
    bucket = f"faults-{next(_numbers)}"
    server.create_bucket(bucket)
    return open_store(f"s3://{bucket}/run")


@pytest.fixture(scope="module")
def expected() -> dict[str, bytes]:
    store = open_store("memory://storage-faults/expected")
    execute(planned("gptq"), store)
    return lasting(store)


@contextlib.contextmanager
def reader(url: str) -> Iterator[Counter[str]]:
    """Poll a run as a user would, and check all that a manifest promises, as long as the block."""
    seen: Counter[str] = Counter()
    ended = threading.Event()
    failures: list[str] = []

    def read() -> None:
        store = open_store(url, QUICK)
        while not ended.is_set():
            try:
                manifest = read_manifest(store)
            except MissingObjectError:
                seen["unfinished"] += 1
            except PipelineError:
                seen["unreadable"] += 1  # in flight: no reader trusts it either
            else:
                seen["finished"] += 1
                failures.extend(finding.problem for finding in damaged_files(store, manifest))
            time.sleep(0.05)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
    assert failures == []


@pytest.mark.parametrize(
    "seed",
    [
        *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(6)),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 40)),
    ],
)
def test_random_faults_leave_the_same_bytes(
    seed: int, store: ObjectStore, proxy: FaultProxy, expected: dict[str, bytes]
) -> None:
    rng = random.Random(seed)
    faults = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=4000)
    plan = [fault if rng.random() < 0.15 else None for fault in faults]
    crash = rng.choice([None, 0, 1, 2, 3])
    with reader(store.root_url) as seen:
        proxy.plan(*plan)
        if crash is not None:
            with contextlib.suppress(CrashError):
                execute(planned("gptq"), store, workers=2, keep_every=1, report=crash_at(crash))
        execute(planned("gptq"), store, workers=2, keep_every=1)
        met = Counter(fault for fault in plan[: len(plan) - len(proxy.script)] if fault)
        proxy.plan()
    assert met.total() >= 5, met
    assert lasting(store) == expected
    assert seen["unfinished"]
    print(f"seed {seed}: {met.total()} faults, {dict(met)}")


@pytest.mark.exhaustive
def test_an_outage_shorter_than_patience_only_delays(
    store: ObjectStore, proxy: FaultProxy, expected: dict[str, bytes]
) -> None:
    outages = iter([("unavailable", 3.0), ("refused", 2.0)])

    def report(step: object) -> None:
        outage = next(outages, None)
        if outage is not None:
            fault, seconds = outage
            proxy.plan(always=fault)
            threading.Timer(seconds, proxy.plan).start()

    execute(planned("gptq"), store, workers=2, keep_every=1, report=report)
    assert next(outages, None) is None
    assert lasting(store) == expected


def test_an_outage_longer_than_patience_ends_the_run_which_resumes(
    store: ObjectStore,
    proxy: FaultProxy,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patience_of(HOPELESS, monkeypatch)
    store = open_store(store.root_url)

    def report(step: object) -> None:
        proxy.plan(always="unavailable")

    with pytest.raises(StorageError, match="check that the store is up"):
        execute(planned("gptq"), store, keep_every=1, report=report)
    proxy.plan()
    assert not store.exists(MANIFEST_KEY)
    patience_of(QUICK, monkeypatch)
    execute(planned("gptq"), store, keep_every=1)
    assert lasting(store) == expected


@pytest.mark.parametrize("key", [file_key(2), "records/block-00001.json"])
def test_another_writer_s_bytes_are_a_divergence_and_nothing_is_published(
    key: str, store: ObjectStore, expected: dict[str, bytes]
) -> None:
    """A worker that computes otherwise, or wrote before us; either may be the one that is wrong."""
    data = expected[key]
    other = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]

    def report(step: object) -> None:
        if not store.exists(key):
            store.put(key, other)

    with pytest.raises(DivergenceError, match="nothing was overwritten") as caught:
        execute(planned("gptq"), store, report=report)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert store.get(key) == other
    assert not store.exists(MANIFEST_KEY)


def test_no_manifest_is_ever_seen_before_all_is_there(
    store: ObjectStore, expected: dict[str, bytes]
) -> None:
    with reader(store.root_url) as seen:
        execute(planned("gptq"), store)
        time.sleep(0.3)
    assert seen["unfinished"] >= 3
    assert seen["finished"] >= 1
    assert not seen["unreadable"]
    assert json.loads(store.get(MANIFEST_KEY))
