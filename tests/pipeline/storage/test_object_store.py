"""One contract for all stores: on disk, in memory, and S3 over the network."""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.canonical import sha256
from pipeline.errors import (
    DamagedObjectError,
    MissingObjectError,
    ObjectExistsError,
    PipelineError,
    StorageError,
)
from pipeline.storage.backend import Patience
from pipeline.storage.object_store import open_store
from tests.fault_proxy import spoil
from tests.s3 import ACCESS_KEY, PAGE_LENGTH, SECRET_KEY, serve_s3
from tests.selection import by_default, covering

ROOT = Path(__file__).parents[3]
DATA = bytes(range(256)) * 41
QUICK = Patience(deadline_seconds=20, read_seconds=1, longest_pause_seconds=0.1)
HOPELESS = Patience(deadline_seconds=0.5, read_seconds=0.3, longest_pause_seconds=0.1)

# Takes the store's URL, the key and the writer's number; waits for a line, creates, reports.
RACER = """
import sys
from pipeline.storage.object_store import open_store
url, key, number = sys.argv[1:]
store = open_store(url)
store.exists(key)
print("ready", flush=True)
sys.stdin.readline()
for turn in range(20):
    try:
        store.create(f"{key}-{turn}", number.encode())
        print(turn, flush=True)
    except FileExistsError:
        pass
"""

# Adds one to what is there, twenty times, however often others are faster.
COUNTER = """
import contextlib, sys
from pipeline.storage.object_store import open_store
url, number = sys.argv[1:]
store = open_store(url)
for turn in range(20):
    while True:
        found = store.get("count")
        with contextlib.suppress(FileExistsError):
            data = b"%d of %s" % (int(found.split()[0]) + 1, number.encode())
            store.replace("count", data, expected=found)
            break
"""


class StoreContract:
    """What every store promises; a subclass gives `url` and `spoil_bit`."""

    @pytest.fixture
    def store(self, url):
        return open_store(url)

    def test_reads_what_was_written(self, store):
        for data in (DATA, b"", b"\0", b"new"):
            store.put("a/b/c.bin", data)
            assert store.get("a/b/c.bin", sha256=sha256(data), size=len(data)) == data
            assert store.size("a/b/c.bin") == len(data)
            assert store.exists("a/b/c.bin")
            store.verify("a/b/c.bin", sha256=sha256(data), size=len(data))

    def test_the_same_url_is_the_same_store(self, store, url):
        store.put("key", DATA)
        assert open_store(f"{url}/").get("key") == DATA
        assert copy.deepcopy(store).get("key") == DATA
        assert store.__reduce__()[1] == (store.root_url,)

    def test_ranges_are_exact(self, store):
        store.put("key", DATA)
        end = len(DATA)
        for start, stop in ((0, 1), (5, 300), (7, 7), (0, end), (end - 1, end)):
            assert store.get_range("key", start, stop) == DATA[start:stop]
        for start, stop in ((0, end + 1), (end - 1, end + 1), (end, end + 1), (end + 9, end + 10)):
            with pytest.raises(DamagedObjectError):
                store.get_range("key", start, stop)
        for start, stop in ((-1, 3), (4, 3)):
            with pytest.raises(StorageError):
                store.get_range("key", start, stop)

    def test_missing_objects_are_named(self, store):
        store.put("there/is/another", DATA)
        for key in ("absent", "there", "there/is", "there/is/another/one"):
            assert not store.exists(key)
            for read in (store.get, store.size, lambda k: store.get_range(k, 0, 1)):
                with pytest.raises(MissingObjectError, match=f"{key} does not exist") as caught:
                    read(key)
                assert store.url(key) in str(caught.value)
                assert isinstance(caught.value, FileNotFoundError)

    def test_deleting_is_repeatable(self, store):
        store.put("key", DATA)
        store.delete("key")
        store.delete("key")
        assert not store.exists("key")
        assert store.list() == ()

    def test_lists_by_prefix_in_order(self, store):
        keys = ["b", "a/10", "a/9", "a/c/d", "ab", "a-b", "a.b", "B/x"]
        for key in keys:
            store.put(key, b"")
        assert store.list() == tuple(sorted(keys))
        assert store.list("a/") == ("a/10", "a/9", "a/c/d")
        assert store.list("a") == ("a-b", "a.b", "a/10", "a/9", "a/c/d", "ab")
        assert store.list("a/1") == ("a/10",)
        assert store.list("a/c/d") == ("a/c/d",)
        assert store.list("z/") == store.list("b/") == ()

    def test_creates_once(self, store):
        store.create("a/key", DATA)
        store.create("a/key", DATA)
        with pytest.raises(ObjectExistsError, match="a/key already exists with other bytes"):
            store.create("a/key", b"other")
        with pytest.raises(FileExistsError):
            store.create("a/key", b"")
        assert store.get("a/key") == DATA
        store.create("empty", b"")
        with pytest.raises(FileExistsError):
            store.create("empty", DATA)

    def test_of_racing_threads_one_wins(self, store):
        num_threads = 8
        for turn in range(10):
            barrier = threading.Barrier(num_threads)
            outcomes = []

            def create(number, key=f"race/{turn}", barrier=barrier, outcomes=outcomes):
                barrier.wait()
                try:
                    store.create(key, b"%d" % number)
                    outcomes.append(number)
                except FileExistsError:
                    outcomes.append(None)

            threads = [threading.Thread(target=create, args=(n,)) for n in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(outcomes) == num_threads
            [winner] = [number for number in outcomes if number is not None]
            assert store.get(f"race/{turn}") == b"%d" % winner

    def test_racing_threads_with_the_same_bytes_all_succeed(self, store):
        failures = []

        def create():
            try:
                store.create("key", DATA)
            except PipelineError as error:
                failures.append(error)

        threads = [threading.Thread(target=create) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []

    def test_of_racing_processes_one_wins(self, store, url):
        if url.startswith("memory:"):
            pytest.skip("memory is not shared between processes")
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", RACER, url, "race", str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for number in range(2)
        ]
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("\n")
            racer.stdin.flush()
        won = [racer.communicate()[0].split() for racer in racers]
        assert [racer.returncode for racer in racers] == [0, 0]
        assert sorted(itertools.chain(*won), key=int) == [str(turn) for turn in range(20)]
        for number, turns in enumerate(won):
            assert all(store.get(f"race-{turn}") == b"%d" % number for turn in turns)

    def test_replaces_only_what_is_expected(self, store):
        store.replace("a/key", b"1", expected=None)
        store.replace("a/key", b"2", expected=b"1")
        store.replace("a/key", b"2", expected=b"1")  # a lost acknowledgement looks like this
        for expected in (None, b"1", b"", b"other"):
            with pytest.raises(ObjectExistsError, match="a/key"):
                store.replace("a/key", b"3", expected=expected)
        assert store.get("a/key") == b"2"
        for key in ("absent", "a", "no/such/place"):
            with pytest.raises(MissingObjectError, match=f"{key} does not exist"):
                store.replace(key, b"3", expected=b"2")
        assert store.list() == ("a/key",)

    def test_of_racing_replacements_none_is_lost(self, store):
        """Each adds one to what is there, as often as it takes."""
        num_threads, num_turns = 4, 5
        store.put("count", b"0 of nobody")

        def add(number):
            for _ in range(num_turns):
                while True:
                    found = store.get("count")
                    count = int(found.split()[0]) + 1
                    with contextlib.suppress(ObjectExistsError):
                        store.replace("count", b"%d of %d" % (count, number), expected=found)
                        break

        threads = [threading.Thread(target=add, args=(n,)) for n in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.get("count").split()[0] == b"%d" % (num_threads * num_turns)

    def test_of_racing_processes_no_replacement_is_lost(self, store, url):
        if url.startswith("memory:"):
            pytest.skip("memory is not shared between processes")
        store.put("count", b"0 of nobody")
        command = [sys.executable, "-c", COUNTER, url]
        racers = [subprocess.Popen([*command, number], cwd=ROOT) for number in "ab"]
        assert [racer.wait() for racer in racers] == [0, 0]
        assert store.get("count").split()[0] == b"40"

    def test_a_version_changes_with_every_other_content(self, store):
        seen = []
        for data in (b"a", b"b", b"", b"ab", b"ba"):
            store.put("x/key", data)
            seen.append(store.version("x/key"))
            assert store.version("x/key") == seen[-1]
        assert len(set(seen)) == len(seen)
        store.put("y", DATA)
        known = store.versions()
        assert list(known) == ["x/key", "y"]
        assert known["x/key"].token == seen[-1]
        assert known["y"].size_bytes == len(DATA)
        assert abs(known["y"].modified - time.time()) < 60
        assert list(store.versions("x/")) == list(store.versions("x")) == ["x/key"]
        assert store.versions("z/") == {}
        store.delete("y")
        with pytest.raises(MissingObjectError):
            store.version("y")
        assert list(store.versions()) == ["x/key"]

    def test_damage_is_seen(self, store, spoil_bit):
        store.put("key", DATA)
        spoil_bit("key", DATA)
        for read in (
            lambda: store.get("key", sha256=sha256(DATA)),
            lambda: store.get("key", size=len(DATA) + 1),
            lambda: store.verify("key", sha256=sha256(DATA), size=len(DATA)),
            lambda: store.verify("key", sha256=sha256(DATA), size=1),
        ):
            with pytest.raises(DamagedObjectError, match="is damaged: it") as caught:
                read()
            assert store.url("key") in str(caught.value)

    @pytest.mark.parametrize(
        "key",
        [
            "", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".a", "a/.b",
            "a\\b", "a b", "a\0b", "a\nb", "a\n", "a?versionId=1", "a#b", "a%2e", "é", "a" * 513,
            "s3://b/a", "~a", "a:b",
        ],
    )  # fmt: skip
    def test_refuses_keys_that_lead_astray(self, store, key):
        for use in (
            store.get, store.size, store.exists, store.delete, store.url,
            lambda k: store.put(k, DATA),
            lambda k: store.create(k, DATA),
            lambda k: store.get_range(k, 0, 1), store.version,
            lambda k: store.replace(k, DATA, expected=None),
            lambda k: store.replace(k, DATA, expected=b""),
        ):  # fmt: skip
            with pytest.raises(StorageError, match="not a storage key"):
                use(key)

    @pytest.mark.parametrize("prefix", ["../", "/", "a//", ".", "a/../", "*"])
    def test_refuses_prefixes_that_lead_astray(self, store, prefix):
        for use in (store.list, store.versions):
            with pytest.raises(StorageError, match="not a prefix"):
                use(prefix)


class TestLocalStore(StoreContract):
    @pytest.fixture
    def url(self, tmp_path):
        return f"{tmp_path}/store"

    @pytest.fixture
    def spoil_bit(self, url):
        def spoil_bit(key, data):
            (Path(url) / key).write_bytes(_flipped(data))

        return spoil_bit

    def test_a_path_and_its_url_are_the_same_store(self, store, url, monkeypatch):
        store.put("key", DATA)
        assert store.url("key") == f"file://{url}/key"
        assert open_store(f"file://{url}").get("key") == DATA
        monkeypatch.chdir(Path(url).parent)
        assert open_store("store").root_url == store.root_url

    def test_leaves_no_temporary_files(self, store, url):
        store.put("a/key", DATA)
        store.create("a/once", DATA)
        with pytest.raises(FileExistsError):
            store.create("a/once", b"")
        assert sorted(path.name for path in Path(url, "a").iterdir()) == ["key", "once"]

    def test_a_version_tells_a_change_though_the_time_was_set_back(self, store, url):
        store.put("key", b"before")
        path = Path(url, "key")
        times, seen = path.stat(), store.version("key")
        path.write_bytes(b"behind")  # as long, the same inode
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert store.version("key") != seen

    def test_hides_what_a_crash_left_and_what_others_keep(self, store, url):
        store.put("a/key", DATA)
        for name in (".key.0123", ".git/config", "has space"):
            path = Path(url) / "a" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")
        assert store.list() == ("a/key",)

    def test_a_file_where_a_directory_belongs_is_named(self, store, url):
        store.put("a", DATA)
        store.put("b/c", DATA)
        for write in (store.put, store.create):
            with pytest.raises(StorageError, match="a file of this name is where a directory"):
                write("a/b", DATA)
        with pytest.raises(StorageError, match="a directory of this name is in the way"):
            store.put("b", DATA)

    def test_a_place_that_holds_no_folders_is_named(self):
        store = open_store("/proc/nowhere")
        for write in (store.put, store.create):
            with pytest.raises(StorageError, match="/proc/nowhere: no folder can be made there"):
                write("a", DATA)

    def test_a_full_disk_says_so(self, store, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        for write in (store.put, store.create):
            with pytest.raises(StorageError, match="disk is full; free some space"):
                write("key", DATA)
        assert not store.exists("key")


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def url(self, request):
        return f"memory://{request.node.name.partition('[')[0]}"

    @pytest.fixture
    def spoil_bit(self, store):
        return lambda key, data: store.put(key, _flipped(data))


@pytest.fixture(scope="module")
def server():
    with serve_s3() as server:
        yield server


@pytest.fixture
def bucket(server, monkeypatch, request):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{sha256(request.node.name.encode())[:12]}"
    server.create_bucket(name)
    return name


class TestS3Store(StoreContract):
    @pytest.fixture
    def url(self, bucket):
        return f"s3://{bucket}/some/root"

    @pytest.fixture
    def spoil_bit(self, server, bucket):
        return lambda key, data: server.client().put_object(
            Bucket=bucket, Key=f"some/root/{key}", Body=_flipped(data)
        )

    def test_a_bucket_alone_is_a_store(self, bucket):
        store = open_store(f"s3://{bucket}")
        store.put("a/key", DATA)
        assert store.list() == store.list("a/") == ("a/key",)
        assert store.get("a/key") == DATA

    def test_lists_more_than_a_page(self, server, bucket, store):
        client = server.client()
        for i in range(PAGE_LENGTH + 1):
            client.put_object(Bucket=bucket, Key=f"some/root/many/{i:04d}", Body=b"")
        assert store.list("many/") == tuple(f"many/{i:04d}" for i in range(PAGE_LENGTH + 1))

    @pytest.mark.exhaustive
    def test_large_objects_are_one_write_each_and_read_in_parts(self, store, server, bucket):
        data = os.urandom(2**20) * 101  # s3fs would send 100 MiB and more in parts
        store.create("large", data)
        assert "-" not in server.client().head_object(Bucket=bucket, Key="some/root/large")["ETag"]
        assert store.get("large", size=len(data)) == data
        store.verify("large", sha256=sha256(data), size=len(data))
        with pytest.raises(FileExistsError):
            store.create("large", b"other")

    def test_sees_at_once_what_others_write(self, store, server, bucket):
        assert store.list() == ()
        assert not store.exists("key")
        server.client().put_object(Bucket=bucket, Key="some/root/key", Body=DATA)
        assert store.list() == ("key",)
        assert store.get("key") == DATA
        server.client().delete_object(Bucket=bucket, Key="some/root/key")
        assert store.list() == ()
        assert not store.exists("key")


def _uses(store):
    yield lambda: store.get("key")
    yield lambda: store.get_range("key", 0, 1)
    yield lambda: store.size("key")
    yield lambda: store.exists("key")
    yield lambda: store.list("a/")
    yield lambda: store.put("key", DATA)
    yield lambda: store.create("key", DATA)
    yield lambda: store.delete("key")


def _fails_at_once(store, remedy):
    """Every operation fails within seconds, in one line that says what to do and no secret."""
    for use in _uses(store):
        start = time.monotonic()
        with pytest.raises(StorageError, match=remedy) as caught:
            use()
        assert time.monotonic() - start < 10
        message = str(caught.value)
        assert not isinstance(caught.value, FileNotFoundError)
        assert message.startswith(store.root_url)
        assert "\n" not in message
        assert SECRET_KEY not in message
        assert ACCESS_KEY not in message


class TestS3Refusals:
    def test_missing_bucket(self, bucket):
        _fails_at_once(open_store("s3://no-such-bucket/root"), "create it, or correct the URL")

    def test_refused_credentials(self, server, bucket):
        with server.demanding_credentials():
            _fails_at_once(open_store(f"s3://{bucket}/root"), "AWS_ACCESS_KEY_ID|s3:ListBucket")

    def test_no_credentials(self, bucket, monkeypatch):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        _fails_at_once(open_store(f"s3://{bucket}/root"), "no usable credentials; set AWS_ACCESS")

    def test_half_of_the_credentials(self, bucket, monkeypatch):
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        _fails_at_once(open_store(f"s3://{bucket}/root"), "no usable credentials; set AWS_ACCESS")

    def test_malformed_endpoint(self, bucket, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "storage.example")
        _fails_at_once(open_store(f"s3://{bucket}/root"), "check AWS_ENDPOINT_URL")

    @pytest.mark.exhaustive  # patience of six seconds
    def test_nobody_listens(self, bucket, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        store = open_store(f"s3://{bucket}/root", HOPELESS)
        _fails_at_once(store, r"cannot be reached .*, \d+ times in \d seconds; check that")

    def test_no_secret_in_any_form_of_a_store(self, bucket):
        store = open_store(f"s3://{bucket}/root")
        store.put("key", DATA)
        shown = f"{store!r} {store} {store.__reduce__()}"
        assert SECRET_KEY not in shown
        assert ACCESS_KEY not in shown


@pytest.fixture(scope="module")
def spoiled(server):
    with spoil(server.endpoint_url) as proxy_and_url:
        yield proxy_and_url


def test_an_access_point_is_listed_by_its_own_name(monkeypatch):
    asked = {}

    def call_s3(self, method, **given):
        asked.update(given)
        return {}

    monkeypatch.setattr("s3fs.S3FileSystem.call_s3", call_s3)
    point = "arn:aws:s3:us-west-2:123456789012:accesspoint/quantized"
    assert open_store(f"s3://{point}/fleet").list("runs/") == ()
    assert (asked["Bucket"], asked["Prefix"]) == (point, "fleet/runs/")


class TestS3Faults:
    @pytest.fixture
    def proxy(self, spoiled, bucket, monkeypatch):
        proxy, url = spoiled
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        proxy.plan()
        return proxy

    @pytest.fixture
    def store(self, proxy, bucket):
        return open_store(f"s3://{bucket}/root", QUICK)

    @pytest.mark.parametrize(
        "fault", by_default(["unavailable", "broken", "refused", "lost", "hang"], ["lost"])
    )
    def test_an_operation_outlives_a_fault(self, store, proxy, fault):
        store.put("key", DATA)
        for faults in ([fault], [fault] * 2):
            for i, (use, expected) in enumerate(
                [
                    (lambda: store.get("key"), DATA),
                    (lambda: store.get_range("key", 3, 9), DATA[3:9]),
                    (lambda: store.size("key"), len(DATA)),
                    (lambda: store.list(), ("key",)),
                    (lambda: store.put("key", DATA), None),
                ]
            ):
                if fault == "hang" and (i not in (0, 4) or len(faults) > 1):
                    continue  # each takes seconds
                proxy.plan(*faults)
                assert use() == expected
                assert not proxy.script

    @pytest.mark.parametrize(
        ("fault", "num_faults"), covering(["unavailable", "broken", "refused", "lost"], [1, 4])
    )
    def test_creating_through_faults_is_our_own_success(self, store, proxy, fault, num_faults):
        proxy.plan(*[fault] * num_faults)
        store.create("key", DATA)
        assert store.get("key") == DATA
        proxy.plan(*[fault] * num_faults)
        with pytest.raises(ObjectExistsError):
            store.create("key", b"other")
        assert store.get("key") == DATA

    @pytest.mark.parametrize("fault", ["unavailable", "broken", "refused", "lost"])
    def test_replacing_through_faults_is_our_own_success(self, store, proxy, fault):
        store.put("key", b"1")
        for skipped in range(3):  # the tag, the bytes, the write
            expected, data = b"%d" % (skipped + 1), b"%d" % (skipped + 2)
            proxy.plan(*[None] * skipped, fault, fault)
            store.replace("key", data, expected=expected)
            assert store.get("key") == data
        with pytest.raises(ObjectExistsError):
            store.replace("key", b"other", expected=b"1")

    @pytest.mark.parametrize("fault", ["cut", "short", "flip"])
    def test_spoiled_bodies_are_read_again(self, store, proxy, fault):
        store.put("key", DATA)
        proxy.plan(fault)
        assert store.get("key", sha256=sha256(DATA), size=len(DATA)) == DATA
        assert not proxy.script
        proxy.plan(None, fault)
        store.verify("key", sha256=sha256(DATA), size=len(DATA))
        assert not proxy.script

    @pytest.mark.parametrize("fault", ["unavailable", "hang", "refused"])
    def test_a_dead_store_is_given_up_by_the_deadline(self, bucket, proxy, fault):
        store = open_store(f"s3://{bucket}/root", HOPELESS)
        proxy.plan(always=fault)
        start = time.monotonic()
        with pytest.raises(StorageError, match=r"times in \d seconds; check that the store is up"):
            store.put("key", DATA)
        assert 0.5 <= time.monotonic() - start < 10

    def test_tries_do_not_multiply(self, bucket, proxy):
        store = open_store(f"s3://{bucket}/root", Patience(deadline_seconds=0.0))
        proxy.plan(always="unavailable")
        with pytest.raises(StorageError):
            store.get("key")
        assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "empty"),
        ("s3://", "names no bucket"),
        ("nosuch://bucket/root", "no filesystem for nosuch"),
        ("file://relative/path", "not an absolute path"),
        ("s3://key:canary@bucket/root", "contains a password"),
        ("s3://bucket/root?versionId=3", "must not contain"),
        ("s3://bucket/../other", "must not contain"),
    ],
)
def test_refuses_urls_that_cannot_work(url, problem):
    with pytest.raises(StorageError, match=problem) as caught:
        open_store(url)
    assert "canary" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_writes_nothing_where_creating_once_is_not_atomic(tmp_path):
    (tmp_path / "key").write_bytes(DATA)
    store = open_store(f"local://{tmp_path}")
    assert store.get("key", sha256=sha256(DATA)) == DATA
    assert store.list() == ("key",)
    for write in (store.put, store.create):
        with pytest.raises(StorageError, match="no create-once writes"):
            write("other", DATA)
    with pytest.raises(StorageError, match="no compare-and-set"):
        store.replace("key", b"other", expected=DATA)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


@pytest.mark.exhaustive
def test_errors_survive_being_sent_between_processes():
    for kind in (StorageError, MissingObjectError, ObjectExistsError, DamagedObjectError):
        error = copy.deepcopy(kind("s3://bucket/key: what to do"))
        assert str(error) == "s3://bucket/key: what to do"
        assert json.dumps(str(error))


def _flipped(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 4]) + data[101:]
