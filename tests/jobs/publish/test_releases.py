"""Publishing is atomic and ordered, and happens once, however many processes try."""

from __future__ import annotations

import threading

import pytest

from jobs.catalog.request import Request
from jobs.publish.releases import find_current, history, publish, published_names, set_current
from jobs.publish.verdict import Verdict
from pipeline.errors import DamagedObjectError
from pipeline.storage.object_store import ObjectStore, open_store


@pytest.fixture(params=["memory", "local"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    if request.param == "memory":
        return open_store(f"memory://releases/{request.node.name.replace('[', '-')[:-1]}")
    return open_store(str(tmp_path_factory.mktemp("releases")))


def result(number: int, aliases: tuple[str, ...] = ()) -> tuple[Request, Verdict]:
    request = Request(
        model="a",
        recipe_name="int8",
        aliases=aliases,
        source_url="s3://bucket/a",
        recipe={"number": number},
        source={},
        texts={},
        evaluation={},
        versions={},
    )
    verdict = Verdict(
        request_id=request.request_id,
        model="a",
        recipe_name="int8",
        run_id=request.run_id,
        plan_digest="0" * 64,
        manifest_sha256=f"{number:064d}",
        source_bytes=2,
        stored_bytes=1,
        quality=None,
        gate=None,
    )
    return request, verdict


def test_each_result_is_a_release_and_the_latest_is_current(root: ObjectStore) -> None:
    assert find_current(root, "a", "int8") is None
    assert history(root, "a", "int8") == ()
    for number in (1, 2):
        publish(root, *result(number))
        publish(root, *result(number))
    past = history(root, "a", "int8")
    assert [release.number for release in past] == [1, 2]
    current = find_current(root, "a", "int8")
    assert current is not None
    assert (current.release, current.moves) == (past[1], 2)
    assert published_names(root) == (("a", "int8"),)


def test_a_crash_before_current_is_set_uses_up_no_number(root: ObjectStore) -> None:
    publish(root, *result(1))
    root.delete("models/a/int8/current.json")
    publish(root, *result(1))
    assert [release.number for release in history(root, "a", "int8")] == [1]
    assert find_current(root, "a", "int8") is not None


def test_a_result_is_published_under_all_its_names(root: ObjectStore) -> None:
    releases = publish(root, *result(1, aliases=("stable",)))
    assert [release.model for release in releases] == ["a", "stable"]
    assert published_names(root) == (("a", "int8"), ("stable", "int8"))


def test_racing_publishers_add_each_result_to_the_history_once(root: ObjectStore) -> None:
    results = [result(number) for number in range(4)]
    threads = [
        threading.Thread(target=publish, args=(root, *one)) for one in results for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    past = history(root, "a", "int8")
    assert [release.number for release in past] == list(range(1, len(past) + 1))
    assert {release.run_id for release in past} == {request.run_id for request, _ in results}
    current = find_current(root, "a", "int8")
    assert current is not None
    assert current.release in past


def test_a_persons_choice_sets_the_replaced_run_aside_until_it_is_chosen_again(
    root: ObjectStore,
) -> None:
    for number in (1, 2):
        publish(root, *result(number))
    first, second = history(root, "a", "int8")
    moved = set_current(root, first, by_person=True)
    assert moved.set_aside == (second.run_id,)
    again = set_current(root, second, by_person=True)
    assert again.set_aside == (first.run_id,)
    assert again.moves == moved.moves + 1
    publish(root, *result(3))
    current = find_current(root, "a", "int8")
    assert current is not None
    assert current.set_aside == (first.run_id,)


def test_a_damaged_current_release_is_reported_and_never_overwritten(root: ObjectStore) -> None:
    publish(root, *result(1))
    key = "models/a/int8/current.json"
    root.put(key, root.get(key).replace(b'"moves": 1', b'"moves": 7'))
    before = root.get(key)
    with pytest.raises(DamagedObjectError, match=r"current\.json is damaged"):
        publish(root, *result(2))
    assert root.get(key) == before
