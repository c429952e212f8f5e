"""Committed parts are found again, damaged ones never used, and two executions agree."""

import dataclasses
import itertools

import pytest

from pipeline.canonical import sha256
from pipeline.errors import (
    DamagedObjectError,
    DivergenceError,
    MissingObjectError,
    PlanMismatchError,
)
from pipeline.run.commits import (
    commit_manifest,
    commit_part,
    committed_parts,
    damaged_files,
    quarantine,
    read_manifest,
)
from pipeline.run.records import (
    FileDigest,
    LayerRecord,
    PartRecord,
    codes_key,
    file_key,
    manifest_of,
    record_key,
)
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.record import RecordError

PLAN = sha256(b"plan")
NUM_BLOCKS = 5
_numbers = itertools.count()


class InjectedCrashError(Exception):
    pass


class CrashBefore:
    """A backend whose process dies before its n-th write."""

    def __init__(self, backend, num_writes):
        self._backend = backend
        self._num_writes = num_writes

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def create(self, key, data):
        if self._num_writes == 0:
            raise InjectedCrashError
        self._num_writes -= 1
        self._backend.create(key, data)


@pytest.fixture
def store():
    return open_store(f"memory://commits-{next(_numbers)}")


def weights_of(part):
    return b"weights of part %d" % part * 10


def files_of(part, codes=False):
    """A part's files by storage key."""
    beside = {codes_key(part): b"codes of part %d" % part * 5} if codes else {}
    return {file_key(part): weights_of(part), **beside}


def record_of(part, previous="", codes=False):
    data = weights_of(part)
    return PartRecord(
        part=part,
        plan_digest=PLAN,
        file=file_key(part),
        sha256=sha256(data),
        size_bytes=len(data),
        loaded_bytes=4 * len(data),
        previous=previous,
        layers=(LayerRecord(path=f"block_{part}/query", account={"loss": part / 3}),),
        codes=FileDigest.of(files_of(part, codes)[codes_key(part)]) if codes else None,
    )


def found_in(store, *, chained=True, verify=True):
    return committed_parts(
        store, PartRecord, plan_digest=PLAN, num_blocks=NUM_BLOCKS, chained=chained, verify=verify
    )


def resume(store, chained=True, codes=False):
    """Commit what is missing, as a run would; returns the parts that it worked on."""
    found = found_in(store, chained=chained)
    quarantine(store, found.findings)
    worked_on = []
    previous = ""
    for part in [*range(1, NUM_BLOCKS + 1), 0]:
        record = found.parts.get(part)
        if record is None:
            record = record_of(part, previous if chained and part else "", codes)
            commit_part(store, record, files_of(part, codes))
            worked_on.append(part)
        previous = record.record_sha256
    return worked_on


def contents(store):
    return {key: store.get(key) for key in store.list() if not key.startswith("quarantine/")}


@pytest.fixture
def whole(store):
    """A store with everything committed."""
    resume(store)
    return store


@pytest.fixture
def expected(whole):
    return contents(whole)


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize(
    ("num_writes", "codes"),
    [(n, codes) for codes in (False, True) for n in range((2 + codes) * (NUM_BLOCKS + 1))],
)
def test_resume_works_only_on_what_was_not_committed(store, chained, num_writes, codes):
    with pytest.raises(InjectedCrashError):
        resume(ObjectStore(store.root_url, CrashBefore(store.backend, num_writes)), chained, codes)
    order = [*range(1, NUM_BLOCKS + 1), 0]
    assert resume(store, chained, codes) == order[num_writes // (2 + codes) :]
    assert resume(store, chained, codes) == []
    undisturbed = open_store(f"memory://commits-{next(_numbers)}")
    resume(undisturbed, chained, codes)
    assert contents(store) == contents(undisturbed)
    assert found_in(store, chained=chained).findings == ()


def test_committing_twice_is_harmless(whole, expected):
    for part, record in found_in(whole).parts.items():
        commit_part(whole, record, files_of(part))
    assert contents(whole) == expected


def test_other_weights_for_the_same_part_are_a_divergence(whole, expected):
    other = b"other weights"
    record = dataclasses.replace(record_of(2), sha256=sha256(other), size_bytes=len(other))
    with pytest.raises(DivergenceError, match=r"model_00002.weights.h5 holds other bytes"):
        commit_part(whole, record, {record.file: other})
    assert contents(whole) == expected


def test_another_record_for_the_same_weights_is_a_divergence(whole, expected):
    record = dataclasses.replace(found_in(whole).parts[2], loaded_bytes=1)
    with pytest.raises(DivergenceError, match=r"block-00001.json holds other bytes"):
        commit_part(whole, record, files_of(2))
    assert contents(whole) == expected


def test_a_divergent_file_without_its_record_is_named(store):
    store.put(file_key(1), b"of an execution that did not get to its record")
    with pytest.raises(DivergenceError, match=r"model_00001.weights.h5 holds other bytes"):
        commit_part(store, record_of(1), files_of(1))
    assert store.list() == (file_key(1),)


def test_a_record_must_describe_what_is_committed(store):
    for record in (record_of(2), record_of(1, codes=True)):
        with pytest.raises(RecordError, match="does not describe"):
            commit_part(store, record, files_of(1))
    assert store.list() == ()


def spoil_record(store, part):
    data = store.get(record_key(part))
    store.put(record_key(part), data.replace(b'"part"', b'"part" '))


def spoil_weights(store, part):
    store.put(file_key(part), b"W" + weights_of(part)[1:])


def truncate_weights(store, part):
    store.put(file_key(part), weights_of(part)[:-1])


def spoil_codes(store, part):
    store.put(codes_key(part), b"C" + files_of(part, codes=True)[codes_key(part)][1:])


SPOILED = {
    spoil_record: record_key,
    spoil_weights: file_key,
    truncate_weights: file_key,
    spoil_codes: codes_key,
}


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("part", [0, 1, 3, NUM_BLOCKS])
@pytest.mark.parametrize("chained", [True, False])
def test_damage_is_reported_quarantined_and_recommitted(store, spoil, part, chained):
    codes = spoil is spoil_codes
    resume(store, chained, codes)
    before = contents(store)
    spoil(store, part)

    found = found_in(store, chained=chained)
    [damaged] = [finding for finding in found.findings if finding.is_damaged]
    assert damaged.key == SPOILED[spoil](part)
    assert store.url(damaged.key) in damaged.problem
    assert "is damaged" in damaged.problem
    unusable = set(range(part, NUM_BLOCKS + 1)) if chained and part else {part}
    assert set(found.parts) == set(range(NUM_BLOCKS + 1)) - unusable

    damage = store.get(damaged.key)
    assert set(resume(store, chained, codes)) == unusable
    assert contents(store) == before
    [aside] = store.list("quarantine/")
    assert store.get(aside) == damage


@pytest.mark.parametrize("verify", [True, False])
def test_all_damaged_files_of_a_part_are_moved_aside_at_once(store, verify):
    resume(store, codes=True)
    for key in files_of(3, codes=True):
        store.put(key, b"other bytes")
    damaged = {one.key for one in found_in(store, verify=verify).findings if one.is_damaged}
    assert damaged == set(files_of(3, codes=True))
    assert set(resume(store, codes=True)) == {3, 4, 5}
    assert store.get(codes_key(3)) == files_of(3, codes=True)[codes_key(3)]


@pytest.mark.parametrize("key_of", [record_key, file_key, codes_key])
@pytest.mark.parametrize("verify", [True, False])
def test_deleted_objects_are_committed_again(store, key_of, verify):
    resume(store, codes=True)
    expected = contents(store)
    store.delete(key_of(3))
    found = found_in(store, verify=verify)
    assert sorted(found.parts) == [0, 1, 2]
    assert not any(finding.is_damaged for finding in found.findings)
    assert resume(store, codes=True) == [3, 4, 5]
    assert contents(store) == expected


def test_a_truncated_file_is_noticed_without_reading_it(whole):
    truncate_weights(whole, 2)
    assert sorted(found_in(whole, verify=False).parts) == [0, 1]
    spoil_weights(whole, 2)
    assert len(found_in(whole, verify=False).parts) == NUM_BLOCKS + 1
    assert sorted(found_in(whole, verify=True).parts) == [0, 1]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (dataclasses.replace(record_of(2), plan_digest="0" * 64), "belongs to plan 000"),
        (record_of(3), "is the record of part 3"),
        (record_of(2), "follows another record"),
    ],
)
def test_a_record_of_another_plan_part_or_chain_is_not_used(whole, record, problem):
    whole.put(record_key(2), record.to_json())
    found = found_in(whole)
    assert sorted(found.parts) == [0, 1]
    assert problem in found.findings[0].problem
    assert found.findings[0].is_damaged


def test_a_manifest_is_committed_once_and_the_first_counts(whole):
    parts = found_in(whole).parts
    with pytest.raises(MissingObjectError):
        read_manifest(whole)
    first = manifest_of(PLAN, parts, {}, {"keras": "3.15.1"})
    assert commit_manifest(whole, first) == first
    assert commit_manifest(whole, first) == first
    # The same artifact, finished with another version of a package.
    assert commit_manifest(whole, manifest_of(PLAN, parts, {}, {"keras": "3.15.2"})) == first
    assert read_manifest(whole) == first


def test_a_manifest_of_other_files_or_another_plan_is_refused(whole):
    parts = found_in(whole).parts
    first = commit_manifest(whole, manifest_of(PLAN, parts, {}, {}))
    with pytest.raises(PlanMismatchError, match="choose another run directory"):
        commit_manifest(whole, dataclasses.replace(first, plan_digest="0" * 64))
    with pytest.raises(DivergenceError, match="names other files"):
        commit_manifest(whole, manifest_of(PLAN, parts, {"artifact/config.json": b"{}"}, {}))
    assert read_manifest(whole) == first


def test_a_damaged_manifest_is_reported(whole):
    manifest = commit_manifest(whole, manifest_of(PLAN, found_in(whole).parts, {}, {}))
    whole.put(manifest.key, manifest.to_json()[:-2])
    with pytest.raises(DamagedObjectError, match=r"manifest.json is damaged"):
        read_manifest(whole)


def test_damaged_files_covers_everything_that_a_manifest_names(store):
    resume(store, codes=True)
    whole = store
    small = {"artifact/config.json": b"{}", "artifact/task.json": b"[]"}
    for key, data in small.items():
        whole.put(key, data)
    manifest = manifest_of(PLAN, found_in(whole).parts, small, {})
    assert damaged_files(whole, manifest) == ()
    spoil_weights(whole, 4)
    spoil_codes(whole, 3)
    spoil_record(whole, 2)
    whole.put("artifact/config.json", b"[]")
    whole.delete("artifact/task.json")
    assert [finding.key for finding in damaged_files(whole, manifest)] == [
        "artifact/config.json", file_key(4), "artifact/task.json", codes_key(3), record_key(2),
    ]  # fmt: skip
