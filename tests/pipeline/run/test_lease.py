"""One driver at a time; a silent one is replaced, and notices."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from pipeline.errors import LeaseHeldError, LeaseLostError, StorageError
from pipeline.run import lease
from pipeline.run.lease import PREFIX, acquire, find_latest, this_process
from pipeline.storage.object_store import ObjectStore, open_store

_numbers = itertools.count()
TERM = 1.2


@pytest.fixture
def store() -> ObjectStore:
    return open_store(f"memory://leases-{next(_numbers)}")


def of_another_machine(store: ObjectStore, epoch: int = 1) -> None:
    """A lease whose holder's process cannot be examined from here."""
    there = dataclasses.replace(this_process(), host="elsewhere", kernel="another")
    claim = {"holder": dataclasses.asdict(there), "nonce": "0"}
    store.put(f"{PREFIX}{epoch:05d}.json", json.dumps(claim).encode())


def test_a_released_lease_is_acquired_at_once(store: ObjectStore) -> None:
    for epoch in (1, 2, 3):
        start = time.monotonic()
        held = acquire(store, seconds=60)
        assert held.epoch == epoch
        held.check()
        held.release()
        assert time.monotonic() - start < 5
    assert find_latest(store).released


def test_acquire_waits_for_a_living_driver(store: ObjectStore) -> None:
    held = acquire(store, seconds=TERM)
    told: list[str] = []
    threading.Timer(3 * TERM, held.release).start()
    start = time.monotonic()
    other = acquire(store, seconds=TERM, tell=told.append)
    assert time.monotonic() - start > 2 * TERM
    assert other.epoch == 2
    [text] = told
    assert f"process {os.getpid()} on " in text
    other.release()


def test_without_waiting_a_living_driver_is_an_error_that_names_it(store: ObjectStore) -> None:
    held = acquire(store, seconds=TERM)
    with pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on .* is at work"):
        acquire(store, seconds=TERM, wait=False)
    held.check()
    held.release()


def test_a_silent_driver_is_replaced_after_a_term_and_notices(store: ObjectStore) -> None:
    of_another_machine(store)
    stale = lease.Lease(store=store, epoch=1, seconds=TERM)
    stale.check()
    start = time.monotonic()
    held = acquire(store, seconds=TERM)
    assert TERM <= time.monotonic() - start < 5 * TERM
    assert held.epoch == 2
    with pytest.raises(LeaseLostError, match=f"process {os.getpid()}"):
        stale.check()
    # Late heartbeats of the old driver change nothing.
    stale.start()
    stale.release()
    held.check()
    assert (find_latest(store).epoch, find_latest(store).released) == (2, False)
    held.release()


def test_a_driver_that_beats_is_never_replaced(store: ObjectStore) -> None:
    of_another_machine(store)
    beating = lease.Lease(store=store, epoch=1, seconds=TERM).start()
    waiting = threading.Thread(target=lambda: acquire(store, seconds=TERM).release())
    waiting.start()
    time.sleep(4 * TERM)
    assert find_latest(store).epoch == 1
    beating.check()
    beating.release()
    waiting.join()
    assert find_latest(store).epoch == 2


def test_clocks_need_not_agree(store: ObjectStore) -> None:
    """No stored object holds a time."""
    held = acquire(store)
    held.release()
    for key in store.list(PREFIX):
        for name in json.loads(store.get(key)):
            assert name in ("holder", "nonce", "beats", "released")


def test_of_many_waiting_drivers_one_follows(store: ObjectStore) -> None:
    of_another_machine(store)
    held: list[lease.Lease] = []

    def try_it() -> None:
        try:
            held.append(acquire(store, seconds=TERM))
            time.sleep(0.3)
        except LeaseHeldError:
            return

    threads = [threading.Thread(target=try_it) for _ in range(6)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    while not held and time.monotonic() - start < 10:
        time.sleep(0.01)
    time.sleep(TERM / 2)
    assert len(held) == 1
    for _ in threads:
        held[-1].release()
        known = len(held)
        deadline = time.monotonic() + 10
        while len(held) == known and known < len(threads) and time.monotonic() < deadline:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert [one.epoch for one in held] == list(range(2, 2 + len(threads)))


def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path) -> None:
    store = open_store(str(tmp_path))
    program = (
        "import os, signal\n"
        "from pipeline.run.lease import acquire\n"
        "from pipeline.storage.object_store import open_store\n"
        f"acquire(open_store({str(tmp_path)!r}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False)
    found = find_latest(store)
    assert found.epoch == 1
    assert not found.released
    assert found.is_over
    start = time.monotonic()
    acquire(store, seconds=60).release()
    assert time.monotonic() - start < 6


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"holder": {"process": "x"}}'])
def test_a_damaged_lease_counts_as_silent(store: ObjectStore, damage: bytes) -> None:
    store.put(f"{PREFIX}00001.json", damage)
    store.put(f"{PREFIX}00001.beat.json", damage)
    held = acquire(store, seconds=TERM)
    assert held.epoch == 2
    held.release()


def test_a_store_outage_does_not_end_a_driver(store: ObjectStore) -> None:
    class Away:
        away = False

        def __getattr__(self, name):
            return getattr(store.backend, name)

        def write(self, key, data):
            if self.away:
                raise StorageError("away")
            store.backend.write(key, data)

    backend = Away()
    held = acquire(ObjectStore(store.root_url, backend), seconds=TERM)
    backend.away = True
    time.sleep(2 * TERM / 6)
    backend.away = False
    beat = find_latest(store).beat
    time.sleep(3 * TERM / 6)
    assert find_latest(store).beat != beat
    held.release()
    assert find_latest(store).released


def test_a_process_is_gone_when_it_ended_or_its_number_was_reused() -> None:
    here = this_process()
    assert not here.is_gone()
    assert dataclasses.replace(here, started=here.started + 1).is_gone()
    assert not dataclasses.replace(here, kernel="another", started=0).is_gone()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert dataclasses.replace(here, process=ended.pid).is_gone()
