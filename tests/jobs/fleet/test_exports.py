"""A catalog's exports: made of what passes its gate, published, kept intact, and collected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage.object_store import ObjectStore, open_store
from tests.jobs.fleet.tiny_catalog import TinyCatalog, tiny_catalog


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyCatalog]:
    """One model in int8 with one export."""
    with tiny_catalog(tmp_path_factory.mktemp("catalog")) as catalog:
        catalog.add("alpha", ["int8"], export=["compressed-tensors"], retention={"keep": 1})
        code, found = catalog.nightly()
        assert (code, found["alpha int8"]["result"]) == (0, "published"), catalog.err
        yield catalog


def release(catalog: TinyCatalog) -> dict[str, Any]:
    return catalog.current("alpha", "int8")["release"]  # type: ignore[no-any-return]


def export_files(catalog: TinyCatalog, export: dict[str, Any]) -> dict[str, bytes]:
    """All files of an export but its card, which says more than the export decides."""
    folder = open_store(f"{catalog.root.root_url}/{export['folder']}")
    card = ("README.md", "eval.json", "card.json")
    return {key: folder.get(key) for key in folder.list() if key not in card}


def test_exports_follow_their_release_through_its_life(published: TinyCatalog) -> None:
    """In one test, since each step builds on those before."""
    catalog, [model] = published, published.values["models"]
    root = catalog.root.root_url
    first = release(catalog)
    [export] = first["exports"]
    before = export_files(catalog, export)
    assert export["folder"].startswith(f"runs/{first['run_id']}/exports/compressed-tensors-")
    assert sum(map(len, before.values())) - len(before["export.json"]) == export["size_bytes"]
    [shown] = catalog.call("status", root)[1]
    assert [one["folder"] for one in shown["exports"]] == [export["folder"]]
    code, verified = catalog.call("verify", f"{root}/runs/{first['run_id']}", "--no-stock")
    assert (code, verified["exports"]) == (0, [export["folder"].split("/", 2)[2]])

    # The next night makes nothing, and reads no weights.
    catalog.work.opened = 0
    _, found = catalog.nightly()
    assert (found["alpha int8"]["result"], catalog.work.opened) == ("up to date", 0)

    # A damaged file of it is found, and made again as it was.
    path = Path(root.removeprefix("file://"), export["folder"], "config.json")
    path.write_bytes(path.read_bytes()[:-1])
    run_url = f"{root}/runs/{first['run_id']}"
    assert catalog.call("verify", run_url, "--no-stock")[0] == 4
    assert "config.json is damaged" in catalog.err
    catalog.work.calls.clear()
    _, found = catalog.nightly()
    assert "artifact damaged: exports/" in found["alpha int8"]["reasons"][0]
    assert (found["alpha int8"]["result"], catalog.work.solves) == ("published", 0)
    assert export_files(catalog, export) == before
    assert release(catalog) == first
    path.unlink()
    (path.parent / "export-request.json").write_bytes(b"{")
    assert catalog.nightly()[1]["alpha int8"]["result"] == "published"
    assert export_files(catalog, export) == before

    # Other settings make another export of the same run, and solve nothing.
    model["export"] = [{"format": "compressed-tensors", "dtype": "bfloat16"}, "dense"]
    _, found = catalog.nightly()
    assert found["alpha int8"]["reasons"] == ["exports changed: their settings"]
    assert catalog.work.solves == 0
    second = release(catalog)
    assert (second["number"], second["run_id"]) == (2, first["run_id"])
    assert [one["format"] for one in second["exports"]] == ["compressed-tensors", "dense"]
    assert export_files(catalog, export) == before
    assert catalog.nightly()[1]["alpha int8"]["result"] == "up to date"

    # What no kept release names is collected; what a person exported there is not.
    person = f"{run_url}/exports/compressed-tensors"
    assert catalog.call("export", run_url, "--format", "dense", "--to", person)[0] == 0
    code, swept = catalog.call("gc", root)
    garbage = [one for of_run in swept for one in of_run["garbage"]]
    collected = {one["key"].rpartition("/")[0] for one in garbage if "release" in one["reason"]}
    assert collected == {export["folder"].split("/", 2)[2]}
    assert catalog.call("gc", root, "--delete")[0] == 0
    assert export_files(catalog, export) == {}
    assert all(export_files(catalog, one) for one in second["exports"])
    assert open_store(person).exists("export.json")

    # Wanted again, it is made again in the same place.
    model["export"] = ["compressed-tensors"]
    assert catalog.nightly()[1]["alpha int8"]["result"] == "published"
    assert release(catalog)["exports"] == [export]
    assert export_files(catalog, export) == before

    # A source that was only written again leads to the same run's exports.
    weights = catalog.folder / "presets" / "alpha" / "model.weights.h5"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data)
    _, found = catalog.nightly()
    assert found["alpha int8"]["reasons"] == ["source changed: model.weights.h5"]
    again = release(catalog)
    assert (again["run_id"], again["exports"]) == (first["run_id"], [export])
    assert catalog.work.solves == 0
    assert catalog.nightly()[1]["alpha int8"]["result"] == "up to date"

    # Nothing is promoted whose export is damaged.
    (path.parent / "model-00001-of-00003.safetensors").write_bytes(b"")
    assert catalog.call("promote", root, "alpha", "int8", first["run_id"])[0] == 4
    assert "model-00001-of-00003.safetensors" in catalog.err


def test_a_release_without_exports_does_not_mention_them(tmp_path: Path) -> None:
    with tiny_catalog(tmp_path) as catalog:
        catalog.add("alpha", ["int8"])
        assert catalog.nightly()[0] == 0
        stored = {key: catalog.root.get(key) for key in catalog.root.list()}
    for key, data in stored.items():
        if key.startswith(("models/", "requests/")):
            assert b'"exports' not in data


@pytest.mark.parametrize(
    ("export", "recipe", "message"),
    [
        ("compressed-tensors", {"mode": "awq", "group_size": 32}, "query: awq"),
        ("gptq", {"mode": "int8"}, "a gptq checkpoint holds no 8 bits, int8 inputs"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_it_is_quantized(
    tmp_path: Path, export: str, recipe: dict[str, Any], message: str
) -> None:
    with tiny_catalog(tmp_path) as catalog:
        scheme = {"name": "small", "scheme": recipe, "calibration": catalog.gptq()["calibration"]}
        catalog.add("alpha", [scheme], export=export)
        for arguments in (["--dry-run"], []):
            code, found = catalog.nightly(*arguments)
            assert (code, found["alpha small"]["result"]) == (2, "failed")
            assert message in found["alpha small"]["text"]
            assert "export: " in found["alpha small"]["text"]
            assert not any("/plan.json" in key for key in catalog.root.list())


def test_a_dry_run_says_what_would_serve_the_exports(tmp_path: Path) -> None:
    with tiny_catalog(tmp_path) as catalog:
        catalog.add("alpha", ["int8"], export=["compressed-tensors"])
        code, found = catalog.nightly("--dry-run")
        assert (code, found["alpha int8"]["result"]) == (0, "to do")
        [export] = found["alpha int8"]["exports"]
        assert "w8a8 int8" in {row["kernel"] for row in export["tensors"]}
        assert catalog.root.list() == ()


class KilledError(BaseException):
    """Ends a process."""


WRITES = ("create", "put", "replace", "delete")


@pytest.mark.parametrize(
    "which",
    [
        pytest.param("some", marks=pytest.mark.exhaustive),
        pytest.param("every", marks=pytest.mark.slow),
    ],
)
def test_a_night_killed_at_any_write_after_the_run_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    after, step = (True, 7) if which == "some" else (False, 1)
    left: list[int] = []

    def dying(write: Callable[..., None]) -> Callable[..., None]:
        def written(store: ObjectStore, key: str, *args: Any, **kwargs: Any) -> None:
            if not left or key.startswith(("leases/", "events/")):
                write(store, key, *args, **kwargs)
                return
            left[0] -= 1
            if after or left[0]:
                write(store, key, *args, **kwargs)
            if not left[0]:
                raise KilledError

        return written

    for name in WRITES:
        monkeypatch.setattr(ObjectStore, name, dying(getattr(ObjectStore, name)))
    with tiny_catalog(tmp_path) as catalog:
        catalog.add("alpha", ["int8"])
        assert catalog.nightly()[0] == 0
        [model] = catalog.values["models"]
        model["export"] = ["dense"]
        made = lasting(catalog.root)
        whole: dict[str, bytes] = {}
        for at in range(1, 100, step):
            left[:] = [at]
            try:
                catalog.nightly()
            except KilledError:
                left.clear()
                code, found = catalog.nightly()
                assert code == 0, catalog.err
                assert found["alpha int8"]["result"] in ("published", "up to date")
            else:
                break
            finally:
                left.clear()
            whole = whole or lasting(catalog.root)
            assert lasting(catalog.root) == whole
            for key in lasting(catalog.root).keys() - made.keys():
                catalog.root.delete(key)
            for key, data in made.items():
                catalog.root.put(key, data)
        assert at > 20
        current = json.loads(whole["models/alpha/int8/current.json"])["content"]
        assert [one["format"] for one in current["release"]["exports"]] == ["dense"]


def lasting(root: ObjectStore) -> dict[str, bytes]:
    """What a night leaves, but for logs, leases, what it tells of nights, and of files' times."""
    passing = ("/events/", "/leases/", "/report/", "seen/")
    return {key: root.get(key) for key in root.list() if not any(x in f"/{key}" for x in passing)}
